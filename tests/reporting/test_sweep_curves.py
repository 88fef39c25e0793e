"""Which curves of a sweep are drawn, and that they are."""

from __future__ import annotations

import math

import matplotlib
import pytest

from llmmed.reporting.sweep_curves import MOST_CURVES, _range, best_curves, picture, widened
from llmmed.reporting.sweep_summary import JobSummary, _picture

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure


def test_the_best_come_first_and_only_so_many() -> None:
    curves = {f"lr={i}": [(10.0, 5.0 + i), (20.0, 3.0 + i)] for i in range(12)}
    assert list(best_curves(dict(reversed(curves.items())))) == [f"lr={i}" for i in range(MOST_CURVES)]


def test_what_is_no_curve_is_left_out() -> None:
    curves = {
        "short": [(10.0, 1.0)],
        "none": [],
        "nan": [(1.0, math.nan), (2.0, 1.0)],
        "good": [(1.0, 2.0), (2.0, 1.0)],
    }
    assert best_curves(curves) == {"good": [(1.0, 2.0), (2.0, 1.0)]}
    assert picture({"short": [(10.0, 1.0)]}) is None


def test_a_picture_is_drawn() -> None:
    drawn = picture({"optimizer=muon": [(1.0, 9.0), (2.0, 3.0), (3.0, 2.0)], "flat": [(1.0, 2.0), (2.0, 2.0)]})
    assert drawn is not None
    assert drawn.startswith(b"\x89PNG")


def test_every_point_after_a_start_is_in_the_picture_unless_its_job_diverges() -> None:
    rises = [(1.0, 9.0), (2.0, 2.0), (3.0, 2.5), (4.0, 3.0)]
    low, high = _range([rises])
    assert low < 2.0
    assert 3.0 < high < 9.0
    _, high = _range([rises, rises, [(1.0, 9.0), (2.0, 50.0), (3.0, 1e4), (4.0, 1e9)]])
    assert 3.0 < high < 9.0
    low, high = _range([[(1.0, 2.0), (2.0, 2.0)]])
    assert low < 2.0 < high


def test_an_axis_of_losses_is_no_finer_than_what_a_loss_says() -> None:
    for low, high in ((7.63444, 7.63447), (2.0, 2.0)):
        ends = widened(low, high, 0.25)
        assert ends[1] - ends[0] == pytest.approx(max(0.01, 0.002 * high))
        assert ends[0] <= low <= high <= ends[1]
    assert widened(2.0, 3.0, 0.25) == (1.75, 3.25)


def test_its_numbers_are_whole() -> None:
    drawn: list[Figure] = []
    close = pyplot.close
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pyplot, "close", drawn.append)
        picture({"a": [(1.0, 7.63444), (2.0, 7.63446)]})
        _picture([JobSummary(f"seed={n}", "", "finished", val_loss=7.63444 + n / 1e5) for n in range(2)])
    for figure, axis in zip(drawn, ("yaxis", "xaxis"), strict=True):
        figure.canvas.draw()
        found = getattr(figure.axes[0], axis)
        assert found.get_offset_text().get_text() == ""
        labels = [float(label.get_text()) for label in found.get_ticklabels()]
        assert 7.62 < min(labels) < max(labels) < 7.65
        assert len(set(labels)) == len(labels)
        close(figure)
