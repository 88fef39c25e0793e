"""Pictures of a benchmark, from its JSON alone.

`ops_time`: an op's device time against the model's size, with the ceiling. `ops_speedup`, `ops_memory`: against
PyTorch. `step`: speed, memory and time to the first step of whole steps. `step_breakdown`: what the device does in one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmmed.benchmark.results import OpRow, OpsResult, StepResult, StepRow
from llmmed.files import write_atomically
from llmmed.reporting.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, YELLOW, folded
from llmmed.reporting.numbers import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KNOWN = {"pytorch": (BLACK, "o"), "compiled": (BLUE, "s"), "triton": (RED, "^"), "liger": (GREEN, "D")}
_OTHERS = (
    (ORANGE, "v"), (PURPLE, "X"), (SKY, "P"), (BLACK, "*"), (GREEN, "<"), (BLUE, ">"), (GREY, "p"),
    (ORANGE, "h"), (PURPLE, "8"), (SKY, "H"), (RED, "d"), (GREY, "."),
)  # fmt: skip
_FAMILIES = {"ours": (BLUE, ""), "plain": (ORANGE, "//"), "hf": (GREEN, "..")}
GROUPS = {  # of a step's device time -> colour and hatch
    "products": (BLUE, ""),
    "attention": (ORANGE, "//"),
    "norm": (GREEN, ".."),
    "rotary": (PURPLE, "xx"),
    "swiglu": (YELLOW, "\\\\"),
    "loss": (RED, "--"),
    "optimizer": (SKY, "++"),
    "other": (GREY, ""),
}
_DPI = 120
_TITLE_WIDTH = 30  # of a contestant's, in characters


def draw(result: OpsResult | StepResult, folder: Path) -> list[Path]:
    """Writes what there is to draw, each picture whole or not at all; returns the files. Nothing timed, no picture."""
    import matplotlib

    matplotlib.use("Agg")
    figures = _ops_figures(result) if isinstance(result, OpsResult) else _step_figures(result)
    written = []
    for name, figure in figures.items():
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=_DPI)
        _close(figure)
        write_atomically(folder / f"{name}.png", picture.getvalue())
        written.append(folder / f"{name}.png")
    return written


def _ops_figures(result: OpsResult) -> dict[str, Figure]:
    timed = [row for row in result.rows if row.total_ms is not None]
    figures = {}
    for dtype, mode in dict.fromkeys((row.dtype, row.mode) for row in timed):
        rows = [row for row in timed if (row.dtype, row.mode) == (dtype, mode)]
        title = f"{result.origin.hardware.device}, {dtype}, {mode} mode, forward + backward"
        end = f"{dtype}_{mode}"
        figures[f"ops_time_{end}"] = _time_figure(rows, title)
        figures[f"ops_speedup_{end}"] = _dots_figure(rows, title, _SPEEDUP)
        if any(row.peak_memory_mib for row in rows):
            figures[f"ops_memory_{end}"] = _dots_figure(rows, title, _MEMORY)
    return figures


def _time_figure(rows: Sequence[OpRow], title: str) -> Figure:
    """A panel an op: device time of every implementation against the size, and the least time possible.

    That is what the least traffic takes at the speed of a copy, or the least products at theirs.
    """
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    ops, sizes, styles = _names(rows, "op"), _names(rows, "size"), _styles(rows)
    columns = min(3 if len(sizes) < 3 else 2, len(ops))
    lines = math.ceil(len(ops) / columns)
    width = max(3.0, 1.2 + 0.95 * len(sizes))
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(max(width * columns, 5.0), 2.5 * lines + 0.9), squeeze=False, layout="constrained"
    )
    for axis in panels.flat[len(ops) :]:
        axis.axis("off")
    for axis, op in zip(panels.flat, ops, strict=False):
        here = [row for row in rows if row.op == op]
        names = _names(here, "implementation")
        for place, name in enumerate(names):
            points = [(sizes.index(row.size) + _dodge(place, len(names)), row.device_ms)
                      for row in here if row.implementation == name]  # fmt: skip
            colour, marker = styles[name]
            axis.plot(*zip(*points, strict=True), f"{marker}-", color=colour, markersize=6, linewidth=1)
        for place, size in enumerate(sizes):
            least = next((row.least_ms for row in here if row.size == size and row.least_ms), None)
            if least is not None:
                axis.plot([place - 0.42, place + 0.42], [least, least], "--", color="0.35", linewidth=1.5)
        axis.set_title(op, fontsize=10)
        axis.set_yscale("log")
        _plain_log_ticks(axis.yaxis)
        axis.set_ylabel("device time (ms)" if rows[0].on_gpu else "time (ms)")
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_xlim(-0.5, len(sizes) - 0.5)
        axis.grid(axis="y", alpha=0.3)
    handles = [Line2D([], [], color=c, marker=m, linewidth=1, label=n) for n, (c, m) in styles.items()]
    if any(row.least_ms for row in rows):
        handles.append(Line2D([], [], color="0.35", linestyle="--", label="ceiling: least time"))
    _finish(figure, title, handles, columns=4 if columns > 1 else 2)
    return figure


@dataclass(frozen=True)
class _Dots:
    """A quantity of every implementation, to be compared along one axis."""

    label: str
    value: Callable[[OpRow], float | None]
    interval: Callable[[OpRow], tuple[float, float] | None]
    reference: float | None  # drawn as a line


def _speedup_interval(row: OpRow) -> tuple[float, float] | None:
    low, high = row.speedup_low, row.speedup_high
    return None if low is None or high is None else (low, high)


_SPEEDUP = _Dots("speed-up over PyTorch (times, right is faster)", lambda row: row.speedup, _speedup_interval, 1.0)
_MEMORY = _Dots("peak memory beyond the inputs (MiB)", lambda row: row.peak_memory_mib or None, lambda row: None, None)


def _dots_figure(rows: Sequence[OpRow], title: str, dots: _Dots) -> Figure:
    """A panel a size, a line an op, a point an implementation."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    ops, sizes, styles = _names(rows, "op"), _names(rows, "size"), _styles(rows)
    columns = min(2, len(sizes))
    lines = math.ceil(len(sizes) / columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(2.0 + 4.4 * columns, (0.9 + 0.5 * len(ops)) * lines + 1.0), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for axis in panels.flat[len(sizes) :]:
        axis.axis("off")
    for axis, size in zip(panels.flat, sizes, strict=False):
        for line, op in enumerate(ops):
            here = [row for row in rows if (row.size, row.op) == (size, op)]
            for place, row in enumerate(here):
                value, colour, marker = dots.value(row), *styles[row.implementation]
                if value is None:
                    continue
                at = line + 0.8 * _dodge(place, len(here))
                if interval := dots.interval(row):
                    axis.plot(interval, [at, at], color=colour, linewidth=1)
                axis.plot([value], [at], marker, color=colour, markersize=6)
            if line:
                axis.axhline(line - 0.5, color="0.85", linewidth=0.8)
        axis.set_title(size, fontsize=10)
        axis.set_xscale("log")
        _plain_log_ticks(axis.xaxis)
        if dots.reference is not None:
            axis.axvline(dots.reference, color="0.35", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(ops)), ops)
        axis.set_ylim(len(ops) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
    for axis in panels.flat[max(0, len(sizes) - columns) : len(sizes)]:  # with nothing below
        axis.set_xlabel(dots.label)
        axis.tick_params(axis="x", which="both", labelbottom=True)
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=n) for n, (c, m) in styles.items()]
    _finish(figure, title, handles, columns=4)
    return figure


def _step_figures(result: StepResult) -> dict[str, Figure]:
    rows = [row for row in result.rows if row.tokens_per_second is not None]
    figures = {}
    if rows:
        figures["step"] = _step_figure(result, rows)
    if any(row.device_ms for row in rows):
        figures["step_breakdown"] = _breakdown_figure(result, [row for row in rows if row.device_ms])
    return figures


def _step_figure(result: StepResult, rows: Sequence[StepRow]) -> Figure:
    """A line of panels a size: speed with its spread, peak memory, time to the first step."""
    from matplotlib import pyplot

    sizes = _names(rows, "size")
    counts = [sum(row.size == size for row in rows) for size in sizes]
    memory = any(row.peak_memory_gib for row in rows)
    columns = 3 if memory else 2
    figure, panels = pyplot.subplots(
        len(sizes), columns, figsize=(2.6 + 3.2 * columns, sum(counts) * 0.42 + 1.1 * len(sizes) + 0.6), squeeze=False,
        gridspec_kw={"height_ratios": [count + 1 for count in counts]}, layout="constrained",
    )  # fmt: skip
    for line, size in zip(panels, sizes, strict=True):
        here = sorted((row for row in rows if row.size == size), key=lambda row: -(row.tokens_per_second or 0))
        titles = [row.title for row in here]
        intervals = [(row.tokens_per_second_low, row.tokens_per_second_high) for row in here]
        _bars(line[0], f"{size}: speed (thousand tokens/s)", here, [_thousand(row.tokens_per_second) for row in here],
              [(_thousand(low), _thousand(high)) for low, high in intervals])  # fmt: skip
        if memory:
            _bars(line[1], "peak memory (GiB)", here, [row.peak_memory_gib for row in here])
        _bars(line[-1], "time to first step (s)", here, [row.first_step_seconds for row in here])
        line[0].set_yticks(range(len(here)), [folded(title, _TITLE_WIDTH) for title in titles])
        for axis in line[1:]:
            axis.set_yticks(range(len(here)), ["" for _ in here])
    figure.suptitle(_step_title(result), fontsize=10)
    return figure


def _bars(
    axis: Axes, label: str, rows: Sequence[StepRow], values: Sequence[float | None],
    intervals: Sequence[tuple[float | None, float | None]] | None = None,
) -> None:  # fmt: skip
    ends = [*values, *(high for _, high in intervals or ())]
    top = max((value for value in ends if value is not None), default=1.0)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            axis.text(0.02, place, "not measured", transform=axis.get_yaxis_transform(), va="center", color="0.4")
            continue
        colour, hatch = _FAMILIES[row.contestant.partition("_")[0]]
        axis.barh(place, value, 0.7, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        end = value
        if intervals is not None:
            low, high = intervals[place]
            if low is not None and high is not None:
                axis.plot([low, high], [place, place], "|-", color="black", linewidth=1.2, markersize=7)
                end = high
        axis.text(end + 0.02 * top, place, digits(value), va="center", fontsize=8)
    axis.set_xlim(0, 1.22 * top)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter("{x:,.6g}")


def _breakdown_figure(result: StepResult, rows: Sequence[StepRow]) -> Figure:
    """A stacked bar a contestant: device time of one step by what it does."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    sizes = _names(rows, "size")
    counts = [sum(row.size == size for row in rows) for size in sizes]
    figure, panels = pyplot.subplots(
        len(sizes), 1, figsize=(9.5, sum(counts) * 0.45 + 1.0 * len(sizes) + 1.2), squeeze=False,
        gridspec_kw={"height_ratios": [count + 1 for count in counts]}, layout="constrained",
    )  # fmt: skip
    what = "device time" if result.origin.hardware.cuda else "time in operators"
    for axis, size in zip(panels[:, 0], sizes, strict=True):
        here = sorted((row for row in rows if row.size == size), key=lambda row: sum((row.device_ms or {}).values()))
        for place, row in enumerate(here):
            left = 0.0
            for group, (colour, hatch) in GROUPS.items():
                width = (row.device_ms or {}).get(group, 0.0)
                axis.barh(place, width, 0.72, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
                left += width
            axis.text(left, place, f" {digits(left)}", va="center", fontsize=8)
        axis.set_yticks(range(len(here)), [folded(row.title, _TITLE_WIDTH) for row in here])
        axis.set_ylim(len(here) - 0.5, -0.5)
        axis.margins(x=0.08)
        axis.set_xlabel(f"{size}: {what} in one step (ms)")
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    present = [g for g in GROUPS if any((row.device_ms or {}).get(g) for row in rows)]
    handles = [Patch(facecolor=GROUPS[g][0], hatch=GROUPS[g][1], edgecolor="white", label=g) for g in present]
    _finish(figure, _step_title(result), handles, columns=8)
    return figure


def _finish(figure: Figure, title: str, handles: Sequence[object], columns: int) -> None:
    figure.suptitle(title, fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)  # type: ignore[call-arg]


def _close(figure: Figure) -> None:
    from matplotlib import pyplot

    pyplot.close(figure)


def _step_title(result: StepResult) -> str:
    shape = result.shapes[0]
    return f"{result.origin.hardware.device}, {shape.precision}, {shape.optimizer}: whole training steps"


def _names(rows: Iterable[OpRow] | Iterable[StepRow], field: str) -> list[str]:
    return list(dict.fromkeys(getattr(row, field) for row in rows))


def _styles(rows: Sequence[OpRow]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every implementation, the same for the known ones in every picture."""
    names = _names(rows, "implementation")
    others = sorted(name for name in names if name not in _KNOWN)
    found = {name: style for name, style in _KNOWN.items() if name in names}
    return found | {name: _OTHERS[place % len(_OTHERS)] for place, name in enumerate(others)}


def _dodge(place: int, of: int) -> float:
    """Beside each other, so that no point hides another."""
    return 0.12 * (place - (of - 1) / 2) * min(1.0, 6 / of)


def _plain_log_ticks(axis: object) -> None:
    """`0.05`, `2`, `300` instead of powers of ten, the denser the shorter the axis. Call it after drawing."""
    from matplotlib.axis import Axis
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    assert isinstance(axis, Axis)
    low, high = axis.get_view_interval()
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if high < 12 * low else (1.0, 2.0, 5.0) if high < 500 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=15) if high > 2.5 * low else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _thousand(value: float | None) -> float | None:
    return None if value is None else value / 1e3
