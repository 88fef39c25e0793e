"""The validation losses of a sweep's jobs against the optimizer step, in one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from llmmed.reporting.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY

MOST_CURVES = 8  # the jobs that came to the lowest loss; more cannot be told apart
_LOOKS = tuple(zip((BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY), "os^DvPX*", strict=True))

Curve = Sequence[tuple[float, float]]  # (step, nats a token)


def best_curves(curves: Mapping[str, Curve]) -> dict[str, list[tuple[float, float]]]:
    """The finite points of the curves that are worth a line, those with the lowest loss first."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
    drawable = {name: points for name, points in finite.items() if len(points) > 1}
    ranked = sorted(drawable, key=lambda name: min(y for _, y in drawable[name]))
    return {name: drawable[name] for name in ranked[:MOST_CURVES]}


def picture(curves: Mapping[str, Curve]) -> bytes | None:
    """A PNG of the best curves, or None where no job has two points."""
    shown = best_curves(curves)
    if not shown:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure, axis = pyplot.subplots(figsize=(8.0, 4.6 + 0.2 * len(shown)), layout="constrained")
    for place, ((name, points), (colour, marker)) in enumerate(zip(shown.items(), _LOOKS, strict=False)):
        steps, losses = zip(*points, strict=True)
        under = 1.2 * (len(shown) - place - 1) / len(shown)  # thinner the later, so that equal curves show each other
        lowest = f"{name.replace('$', chr(92) + '$')}: {min(losses):.3f}"
        size, width = 4 + 4 * under, 1.4 + 2 * under
        axis.plot(steps, losses, color=colour, marker=marker, markersize=size, linewidth=width, label=lowest)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("validation loss (nats a token)")
    axis.set_ylim(*_range(list(shown.values())))
    axis.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    title = "job: lowest loss"
    figure.legend(loc="outside lower left", title=title, fontsize="small", alignment="left", frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    pyplot.close(figure)
    return drawn.getvalue()


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    """All that follows the first quarter of each curve: a start says little and takes most of the room.

    One that diverges does not flatten the others: it may reach three times as far above the lowest as their middle one.
    """
    low = min(y for points in curves for _, y in points)
    highs = sorted(max(y for _, y in points[len(points) // 4 :]) for points in curves)
    high = min(highs[-1], low + 3 * (highs[len(highs) // 2] - low) or highs[-1])
    return widened(low, high, 0.05)


def widened(low: float, high: float, margin: float) -> tuple[float, float]:
    """The ends of an axis for losses: `margin` of the range on both sides, and never so little that noise fills it."""
    least = max(0.01, 0.002 * abs(high))
    more = max(margin * (high - low), (least - (high - low)) / 2)
    return low - more, high + more
