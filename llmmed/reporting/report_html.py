"""What the reports are drawn with: curves and bars as SVG, tables, and the page with its style for light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from llmmed.reporting.drawing import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW
from llmmed.reporting.numbers import digits

_MOST_POINTS = 600  # of a curve
_COLOURS = (SKY, ORANGE, GREEN, YELLOW, PURPLE, RED, BLUE)


def chart(title: str, series: Mapping[str, list[tuple[float, float]]], *, from_zero: bool = False) -> str:
    """Lines against the optimizer step, as SVG whose colours are the page's. Empty without a point."""
    if not (drawn := {name: _thinned(points) for name, points in series.items() if points}):
        return ""
    left, right, top, bottom = 98.0, 450.0, 12.0, 222.0
    everything = [point for points in drawn.values() for point in points]
    first, last = min(x for x, _ in everything), max(x for x, _ in everything)
    x_ticks = _ticks(0.0 if first < last / 2 else first, last)
    y_ticks = _ticks(0.0 if from_zero else min(y for _, y in everything), max(y for _, y in everything))

    def at(x: float, y: float) -> tuple[float, float]:
        along, up = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]), (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(left + along * (right - left), 1), round(bottom - up * (bottom - top), 1)

    parts = []
    for tick, text in zip(y_ticks, _labels(y_ticks), strict=True):
        y = at(x_ticks[0], tick)[1]
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(f'<text class="y" x="{left - 6}" y="{y + 4}">{text}</text>')
    for tick, text in zip(x_ticks, _labels(x_ticks), strict=True):
        parts.append(f'<text class="x" x="{at(tick, y_ticks[0])[0]}" y="{bottom + 19}">{text}</text>')
    for index, points in enumerate(drawn.values()):
        places = [at(x, y) for x, y in points]
        parts.append(f'<polyline class="s{index}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        if index or len(places) <= 40:
            parts += [f'<circle class="s{index}" cx="{x}" cy="{y}" r="{2 + index}"/>' for x, y in places]
    parts.append(f'<text class="x" x="{(left + right) / 2}" y="{bottom + 42}">optimizer step</text>')
    parts.append(f'<text class="x" transform="translate(14 {(top + bottom) / 2}) rotate(-90)">{escape(title)}</text>')
    legend = "".join(f'<span class="key s{index}">{escape(name)}</span>' for index, name in enumerate(drawn))
    svg = f'<svg viewBox="0 0 480 272" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{legend}</figcaption>{svg}</figure>"


def bars(title: str, unit: str, values: Mapping[str, Sequence[tuple[int | None, str, float]]]) -> str:
    """A stacked bar an entry, as SVG: segments of (place or None for what is left over, name, value), from zero.

    A segment carries its number, the one that `swatch` shows, so that nothing hangs on its colour alone.
    """
    left, right, top, height, gap = 12.0, 462.0, 20.0, 30.0, 26.0
    ticks = _ticks(0.0, max(sum(value for *_, value in segments) for segments in values.values()))
    bottom = top + len(values) * (height + gap) - gap + 10
    scale = (right - left) / ticks[-1]
    parts = []
    for tick, text in zip(ticks, _labels(ticks), strict=True):
        x = round(left + tick * scale, 1)
        parts.append(
            f'<path class="grid" d="M{x} {top}V{bottom}"/><text class="x" x="{x}" y="{bottom + 17}">{text}</text>'
        )
    for row, (name, segments) in enumerate(values.items()):
        y, x = top + row * (height + gap), left
        total = sum(value for *_, value in segments)
        parts.append(f'<text class="over" x="{left}" y="{y - 6}">{escape(name)}: {digits(total)} {escape(unit)}</text>')
        for place, segment, value in segments:
            width = round(value * scale, 1)
            tip = f"<title>{escape(segment)}: {digits(value)} {escape(unit)}</title>"
            parts.append(
                f'<rect class="{_fill(place)}" x="{x:.1f}" y="{y}" width="{width}" height="{height}">{tip}</rect>'
            )
            if place is not None and width >= 16:
                middle = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 5}"'
                parts.append(f'<text class="x on {_fill(place)}" {middle}>{place + 1}</text>')
            x += width
    parts.append(f'<text class="x" x="{(left + right) / 2}" y="{bottom + 38}">{escape(f"{title} ({unit})")}</text>')
    svg = f'<svg viewBox="0 0 480 {bottom + 46}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure class="bars">{svg}</figure>'


def swatch(place: int | None) -> str:
    """The mark of a segment of `bars`, for a legend."""
    return f'<span class="swatch {_fill(place)}">{"" if place is None else place + 1}</span>'


def _fill(place: int | None) -> str:
    return "rest" if place is None else f"f{place % len(_COLOURS)}"


def decimals(largest: float) -> int:
    """Digits after the point for a column of numbers, so that the largest has four and all of them stand in line."""
    return min(5, max(0, 3 - math.floor(math.log10(largest)))) if largest > 0 else 0


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most twice `_MOST_POINTS`: of every stretch the lowest and the highest, so that no spike is lost."""
    stretch = math.ceil(len(points) / _MOST_POINTS)
    if stretch <= 2:
        return points
    found = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        found += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return found


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose the range."""
    if high - low <= 1e-9 * abs(high):
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [place * step for place in range(first, last + 1)]


def _labels(ticks: Sequence[float]) -> Iterator[str]:
    step, largest = ticks[1] - ticks[0], max(map(abs, ticks))
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    for tick in ticks:
        yield f"{tick:.1e}" if largest < 1e-3 and tick else f"{tick:,.{places}f}"


def table(headers: Sequence[str], rows: Sequence[str], numbers: range) -> str:
    head = "".join(
        f'<th class="{"number" if index in numbers else ""}">{escape(header)}</th>'
        for index, header in enumerate(headers)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def page(title: str, subtitle: str, sections: Mapping[str, str]) -> str:
    """`subtitle` and the sections are HTML, the title is not."""
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}{_FILLS}</style></head>\n<body><header><h1>{escape(title)}</h1><p>{subtitle}</p></header>"
        f"<main>{body}</main></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f4f6f8; --text: #1b1f24; --dim: #57606a; --line: #d0d7de;
  --shade: #0003;  --s0: #0072b2; --s1: #d55e00; --good: #17703a; --bad: #b3261e; --warn: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1e232a; --text: #e6e9ed; --dim: #9aa4af;
  --line: #3a424c; --shade: #000a; --s0: #56b4e9; --s1: #e69f00; --good: #5fd38d; --bad: #ff8a80; --warn: #f0c060 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 8px 0 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 28px 0 8px }
h3 { font-size: 1rem; margin: 0 } header p { margin: 4px 0; overflow-wrap: anywhere } a { color: var(--s0) }
.badge { border: 1px solid; border-radius: 9px; padding: 1px 9px; font-weight: 600 }
.finished, .verified { color: var(--good) } .failed, .wrong, .crashed, .no_backward, .timed_out { color: var(--bad) }
.interrupted, .running, .not-started, .out_of_memory, .failed_to_compile { color: var(--warn) }
.unavailable, .not_tried { color: var(--dim) } .reason { font-weight: 600; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 8px }
.tile { background: var(--card); border-radius: 8px; padding: 8px 12px } .tile * { display: block }
.tile span { font-size: 1.35rem; font-variant-numeric: tabular-nums } .tile b, .tile i, i { font: inherit;
  font-size: .85rem; color: var(--dim) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 12px }
figure { margin: 0; max-width: 620px } figcaption { min-height: 1.5em; padding-left: 20% }
svg { width: 100%; display: block } svg text { fill: var(--dim); font-size: 14px } text.x { text-anchor: middle }
text.y { text-anchor: end } .grid { stroke: var(--line); fill: none }
polyline { fill: none; stroke-width: 1.6 } polyline.s0 { stroke: var(--s0) } polyline.s1 { stroke: var(--s1);
  stroke-dasharray: 6 4 } circle.s0 { fill: var(--s0) } circle.s1 { fill: var(--s1) }
.key { margin-right: 16px; color: var(--dim) } .key::before { content: ""; display: inline-block; width: 22px;
  margin-right: 6px; vertical-align: middle; border-top: 3px solid var(--s0) } .key.s1::before {
  border-top: 3px dashed var(--s1) }
.where { color: var(--dim) }
.scroll { overflow-x: auto; max-width: max-content;
  background: linear-gradient(to left, var(--page) 60%, transparent) right / 40px 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 14px 100% no-repeat }
.scroll td:first-child, .scroll thead th:first-child { position: sticky; left: 0; background: var(--page) }
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
thead th { vertical-align: bottom; color: var(--dim) } .number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums } thead .number { white-space: normal } .state { white-space: nowrap }
.op th { padding-top: 14px } .chosen td { font-weight: 600 } td.why { min-width: 300px; font-weight: 400 }
.idle td { color: var(--dim) }
.pairs td { overflow-wrap: anywhere } .pairs th { font-weight: 400; color: var(--dim) }
pre { background: var(--card); border-radius: 8px; padding: 8px 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .82rem }
.bars { margin-bottom: 8px } text.over { paint-order: stroke; stroke: var(--page); stroke-width: 4px }
rect { stroke: var(--page); stroke-width: 1 }
.rest { fill: var(--line); background: var(--line) } svg text.on { fill: #000; font-weight: 600; stroke: none }
svg text.on.f6 { fill: #fff } .part { white-space: nowrap }
.swatch { display: inline-block; vertical-align: middle; width: 20px; height: 20px; margin-right: 8px;
  border-radius: 3px; text-align: center; font-size: 13px; line-height: 20px; font-weight: 600; color: #000 }
.swatch.f6 { color: #fff } .samples { display: grid; gap: 12px }
.samples > div { background: var(--card); border-radius: 8px; padding: 4px 12px; overflow-wrap: anywhere }
.samples p { margin: 6px 0; white-space: pre-wrap } summary { color: var(--dim); cursor: pointer; margin: 4px 0 }
img { width: 100%; min-width: 760px; background: #fff; border-radius: 8px }
@media (prefers-color-scheme: dark) { img { filter: invert(.9) hue-rotate(180deg) } }
"""
_FILLS = "".join(f".f{place} {{ fill: {c}; background: {c} }}\n" for place, c in enumerate(_COLOURS))
