"""Which curves of a sweep are drawn, and that they are."""

from __future__ import annotations

import math

from llmmed.reporting.sweep_curves import MOST_CURVES, _range, best_curves, picture


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
