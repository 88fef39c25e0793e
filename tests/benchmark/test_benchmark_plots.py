"""A benchmark's pictures: all of their text is there, and everything can be told apart."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from llmmed.kernels import catalog
from llmmed.reporting import benchmark_plots
from llmmed.reporting.benchmark_plots import draw
from tests.benchmark.samples import NAMES, ops_result, step_result


def test_pictures_are_of_a_size_that_a_page_can_show(tmp_path: Path) -> None:
    for path in [*draw(ops_result(NAMES, catalog.op_names()), tmp_path), *draw(step_result(), tmp_path)]:
        height, width, _ = matplotlib.image.imread(path).shape
        assert 400 < width < 2000
        assert 300 < height < 2400


def test_every_implementation_has_a_colour_and_a_marker_of_its_own() -> None:
    names = sorted({name for op in catalog.op_names() for name in catalog.implementation_names(op)} | {"mine", "yours"})
    styles = benchmark_plots._styles(ops_result(names, ["attention"]).rows[:-1])
    assert len(set(styles.values())) == len(names)
    assert len({marker for _, marker in styles.values()}) == len(names)
    okabe_and_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"}
    assert {colour for colour, _ in styles.values()} <= {*okabe_and_ito, "#999999"}


@pytest.mark.filterwarnings("error")
def test_a_wide_interval_stays_in_its_panel() -> None:
    whole = step_result()
    wild = whole.rows[0].model_copy(update={"tokens_per_second_high": 500_000.0})
    figure = benchmark_plots._step_figure(whole, [wild, whole.rows[1]])
    figure.canvas.draw()
    speed = figure.axes[0]
    assert speed.get_xlim()[1] > 500
    assert all(text.get_position()[0] < speed.get_xlim()[1] for text in speed.texts)
    benchmark_plots._close(figure)


def test_pictures_of_three_sizes_have_all_of_their_text() -> None:
    names = sorted({name for op in catalog.op_names() for name in catalog.implementation_names(op)})
    two = ops_result(names, ["rotary", "swiglu"])
    large = [row.model_copy(update={"size": "large"}) for row in two.rows if row.size == "base"]
    figures = benchmark_plots._ops_figures(two.model_copy(update={"rows": [*two.rows, *large]}))
    for name, figure in figures.items():
        figure.canvas.draw()
        legend, page = figure.legends[0].get_window_extent(), figure.bbox
        assert page.x0 <= legend.x0, name
        assert legend.x1 <= page.x1, name
        if not name.startswith("ops_time"):
            small, base, last, nothing = figure.axes
            for axis in (base, last):
                assert axis.get_xlabel()
                assert any(label.get_visible() and label.get_text() for label in axis.get_xticklabels())
            assert not small.get_xlabel()
            assert not nothing.get_xlabel()
        benchmark_plots._close(figure)
