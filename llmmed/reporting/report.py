"""`report.html` in a run's or a sweep's folder: one file that needs nothing else, no script and no network.

Made from what lies in the folder, so that failed and unfinished runs have a report too.
"""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from llmmed.autotune.plan import Candidate, KernelPlan, OpPlan
from llmmed.errors import UserError
from llmmed.files import write_atomically
from llmmed.reporting import sweep_summary
from llmmed.reporting.sweep_summary import JobSummary, metrics_of, number, stored, summarize_run, told_kernels
from llmmed.run_folder import shown

_ABSENT = "\N{EN DASH}"
_MOST_POINTS = 600  # of a curve
_LOG_LINES = 40


def main(arguments: Sequence[str]) -> int:
    """Writes the reports of the folders named, prints where they are, and returns the exit code."""
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    if not arguments or any(argument.startswith("-") for argument in arguments):
        errors.print("error: write report.py <run or sweep folder>, for instance outputs/2026-01-31/12-00-00")
        return 1
    try:
        for argument in arguments:
            console.print(f"report in {shown(write_report(Path(argument), console))}", markup=False, soft_wrap=True)
    except UserError as error:
        errors.print(f"error: {error}", markup=False)
        return 1
    except OSError as error:
        errors.print(f"error: the report cannot be written: {error}", markup=False)
        return 1
    return 0


def write_report(folder: Path, console: Console) -> Path:
    """Of a sweep also every job's report, and the comparison on the terminal. Raises `UserError` and `OSError`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give a run's or a sweep's, for instance below outputs/")
    if sweep_summary.is_sweep(folder):
        jobs = sweep_summary.tell(folder, console)
        for job in jobs:
            if job.folder:
                write_atomically(folder / job.folder / "report.html", run_page(folder / job.folder))
        page = sweep_page(folder, jobs)
    elif (folder / ".hydra").is_dir() or (folder / "status.json").exists():
        page = run_page(folder)
    else:
        raise UserError(f"{folder}: that is no run folder and no sweep; it has neither status.json nor jobs in it")
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def run_page(folder: Path) -> str:
    """The report of one run, as HTML."""
    run = summarize_run(folder)
    sections = {
        "Result": _result(run, folder),
        "Curves": _curves(folder),
        "Kernels": _kernels(folder),
        "Reproduce": _reproduce(folder),
        "Configuration": _configuration(folder),
        "Environment": _environment(folder),
        "Log": _log(folder),
    }
    badge = f'<span class="badge {run.status.replace(" ", "-")}">{run.status}</span>'
    return _page(f"Run {folder.resolve().name}", f"{badge} {escape(run.job)}", sections)


def sweep_page(folder: Path, jobs: Sequence[JobSummary]) -> str:
    """The report of a sweep, as HTML: the comparison that `sweep_summary` wrote beside it."""
    columns = sweep_summary.columns(jobs)
    rows = []
    for job in jobs:
        name = escape(job.job)
        linked = f'<a href="{quote(job.folder)}/report.html">{name}</a>' if job.folder else name
        cells = [f"<td>{linked}</td>", f'<td class="state {job.status.replace(" ", "-")}">{job.status}</td>']
        cells += [f'<td class="number">{column.value(job) or _ABSENT}</td>' for column in columns]
        cells += [f"<td>{escape(told_kernels(job.kernels))}</td>", f'<td class="why">{escape(job.reason or "")}</td>']
        rows.append(f"<tr>{''.join(cells)}</tr>")
    headers = ["job", "status", *(column.title for column in columns), "kernels other than pytorch", "reason"]
    picture = base64.b64encode((folder / "sweep_summary.png").read_bytes()).decode()
    sections = {
        "Comparison": _table(headers, rows, numbers=range(2, 2 + len(columns))),
        "Plots": f'<div class="scroll"><img alt="the comparison as bars" src="data:image/png;base64,{picture}"></div>',
    }
    done = sum(job.status == "finished" for job in jobs)
    return _page(f"Sweep {folder.resolve().name}", f"{done} of {len(jobs)} jobs finished", sections)


def _result(run: JobSummary, folder: Path) -> str:
    summary = stored(folder / "summary.json") if run.status == "finished" else {}
    values = [
        ("training loss", run.train_loss, ".4f", "nats a token"),
        ("validation loss", run.val_loss, ".4f", "nats a token"),
        ("best validation loss", summary.get("best/val_loss"), ".4f", f"at step {summary.get('best/step')}"),
        ("throughput", run.tokens_per_second, ",.0f", "tokens/s"),
        ("MFU", run.mfu, ".1%", "of the GPU's dense peak"),
        ("peak memory", run.peak_memory_gib, ".2f", "GiB"),
        ("first step", run.time_to_first_step_seconds, ".1f", "s after the start"),
        ("training", run.training_time_seconds, ",.1f", "s"),
        ("steps", run.steps, ",", "optimizer steps"),
        ("parameters", summary.get("total_parameters"), ",", "trained"),
    ]
    tiles = "".join(
        f'<div class="tile"><b>{name}</b><span>{format(value, form)}</span><i>{escape(unit)}</i></div>'
        for name, value, form, unit in values
        if isinstance(value, int | float)
    )
    parts = [f'<p class="reason {run.status}">{run.status}: {escape(run.reason)}</p>'] if run.reason else []
    if tiles and run.status != "finished":
        parts.append("<p>The run did not finish: these are the last numbers that it wrote.</p>")
    return "".join(parts) + (f'<div class="tiles">{tiles}</div>' if tiles else "<p>No numbers were written.</p>")


def _curves(folder: Path) -> str:
    metrics = metrics_of(folder)

    def series(key: str) -> list[tuple[float, float]]:
        found = [(float(m["step"]), float(m[key])) for m in metrics if isinstance(m.get(key), int | float)]
        return [(x, y) for x, y in found if math.isfinite(y)]

    speed = [(x, y) for x, y in series("tokens_per_second") if y > 0]
    charts = [
        _chart("loss (nats a token)", {"training": series("loss"), "validation": series("val/loss")}),
        _chart("throughput (tokens/s)", {"throughput": speed}, from_zero=True),
        _chart("gradient norm", {"gradient norm": series("grad_norm")}),
        _chart("learning rate", {"learning rate": series("lr")}, from_zero=True),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "<p>No step was logged.</p>"


def _kernels(folder: Path) -> str:
    try:
        plan = KernelPlan.read(folder / "kernels.json")
    except UserError as error:
        return f"<p>{escape(str(error)) if (folder / 'kernels.json').exists() else 'No kernels were chosen yet.'}</p>"
    candidates = [candidate for op in plan.ops.values() for candidate in op.candidates.values()]
    columns = [column for column in _COLUMNS if any(map(column.value, candidates))]
    rows = []
    for name, op in plan.ops.items():
        rows.append(f'<tr class="op"><th colspan="{len(columns) + 3}">{escape(name)} <i>{_calls(op)}</i></th></tr>')
        for implementation, candidate in op.candidates.items():
            chosen = implementation == op.chosen
            cells = [f"<td>{'&#10003; ' if chosen else ''}{escape(implementation)}</td>"]
            cells.append(f'<td class="{candidate.status}">{candidate.status.replace("_", " ")}</td>')
            cells += [f'<td class="number">{column.value(candidate) or _ABSENT}</td>' for column in columns]
            cells.append(f'<td class="why">{escape(candidate.reason) or _ABSENT}</td>')
            rows.append(f'<tr class="{"chosen" if chosen else ""}">{"".join(cells)}</tr>')
    source = "read from the tuning cache" if plan.cached else f"found in {plan.tuning_seconds:,.1f} s"
    text = (
        f"Policy {plan.policy}, {plan.mode} mode; {source}. Times are those of all calls of a micro-batch, the "
        "interval at 95 % confidence. The error is the largest relative L2 error of an output or a gradient "
        "against float64; at 1 of what is allowed, a kernel is rejected."
    )
    headers = ["implementation", "verdict", *(column.header for column in columns), "why"]
    if (ceilings := plan.ceilings) is not None:
        products = "".join(f", {tflops:,.0f} TFLOP/s ({d} product)" for d, tflops in ceilings.product_tflops.items())
        text += f" Ceilings measured: {ceilings.copy_gb_per_second:,.0f} GB/s (copy, read + write){products}."
    return f"<p>{escape(text)}</p>{_table(headers, rows, numbers=range(2, 2 + len(columns)))}"


def _reproduce(folder: Path) -> str:
    environment = stored(folder / "env.json")
    try:
        overrides = list(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return "<p>The overrides of the run are not there.</p>"
    commit = (environment.get("git") or {}).get("commit")
    lines = [f"git checkout {commit}"] if commit else []
    command = ["python", "scripts/train.py", *map(str, overrides)]
    lines.append(shlex.join(command))
    text = "<p>The same configuration, tuned anew where it runs:</p>" + _pre("\n".join(lines))
    if (folder / "kernels.json").exists():
        plan = folder.resolve() / "kernels.json"
        text += "<p>With this run's kernels, verified again:</p>" + _pre(shlex.join([*command, f"kernels.plan={plan}"]))
    changed = (environment.get("git") or {}).get("changed_files")
    if changed:
        text += f"<p>The source was not that of the commit: {len(changed)} files had changes.</p>"
        text += _pre("\n".join(map(str, changed)))
    if isinstance(given := environment.get("command"), list):
        where = escape(str(environment.get("working_folder")))
        text += f"<p>What was typed, in <code>{where}</code>:</p>" + _pre(shlex.join(map(str, given)))
    return text


def _configuration(folder: Path) -> str:
    path = folder / ".hydra" / "config.yaml"
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return "<p>The configuration is not there, or is damaged.</p>"
    assert isinstance(values, dict)
    groups: dict[str, Any] = {str(key): value for key, value in values.items() if isinstance(value, dict)}
    alone = {key: value for key, value in values.items() if not isinstance(value, dict)}
    cards = [
        f"<div><h3>{escape(name)}</h3>{_pre(OmegaConf.to_yaml(OmegaConf.create(group)).rstrip())}</div>"
        for name, group in [("run", alone), *groups.items()]
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _environment(folder: Path) -> str:
    environment = stored(folder / "env.json")
    try:
        rows = KernelPlan.read(folder / "kernels.json").hardware.model_dump()
    except UserError:
        rows = {"device": "not known before the kernels were chosen"}
    rows |= {key: environment.get(key) for key in ("started", "host", "platform", "python", "working_folder")}
    rows |= {"commit": (environment.get("git") or {}).get("commit"), **(environment.get("packages") or {})}
    lines = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(str(value)) if value else _ABSENT}</td></tr>"
        for name, value in rows.items()
    )
    return f'<div class="scroll"><table class="pairs">{lines}</table></div>'


def _log(folder: Path) -> str:
    try:
        lines = (folder / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    note = f"<p>The last of {len(lines)} lines of <code>train.log</code>.</p>" if len(lines) > _LOG_LINES else ""
    return note + _pre("\n".join(lines[-_LOG_LINES:])) if lines else "<p>The log is empty or not there.</p>"


@dataclass(frozen=True)
class _Column:
    header: str  # what, unit
    value: Callable[[Candidate], str]  # empty if absent


def _digits(value: float | None) -> str:
    """Four significant digits without an exponent."""
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def _interval(candidate: Candidate) -> str:
    if candidate.total_ms_low is None or candidate.total_ms_high is None:
        return ""
    return f"{_digits(candidate.total_ms_low)}\N{EN DASH}{_digits(candidate.total_ms_high)}"


_COLUMNS = (
    _Column("relative error", lambda c: number(c.relative_error, ".1e")),
    _Column("error / allowed", lambda c: number(c.worst_ratio, ".2g")),
    _Column("forward, ms", lambda c: _digits(c.forward_ms)),
    _Column("backward, ms", lambda c: _digits(c.backward_ms)),
    _Column("total, ms", lambda c: _digits(c.total_ms)),
    _Column("interval, ms", _interval),
    _Column("memory, MiB", lambda c: number(c.peak_memory_mib, ",.0f")),
    _Column("share of ceiling", lambda c: number(c.share_of_ceiling, ".0%")),
    _Column("speed-up over pytorch", lambda c: number(c.speedup, ".2f")),
)


def _calls(op: OpPlan) -> str:
    count = sum(call.count for call in op.calls)
    return f"{count} call{'s' if count != 1 else ''} a micro-batch"


def _chart(title: str, series: Mapping[str, list[tuple[float, float]]], *, from_zero: bool = False) -> str:
    """Lines against the optimizer step, as SVG whose colours are the page's. Empty without a point."""
    if not (drawn := {name: _thinned(points) for name, points in series.items() if points}):
        return ""
    left, right, top, bottom = 98.0, 450.0, 12.0, 222.0
    everything = [point for points in drawn.values() for point in points]
    x_ticks = _ticks(min(x for x, _ in everything), max(x for x, _ in everything))
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


def _table(headers: Sequence[str], rows: Sequence[str], numbers: range) -> str:
    head = "".join(
        f'<th class="{"number" if index in numbers else ""}">{escape(header)}</th>'
        for index, header in enumerate(headers)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _page(title: str, subtitle: str, sections: Mapping[str, str]) -> str:
    """`subtitle` and the sections are HTML, the title is not."""
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><header><h1>{escape(title)}</h1><p>{subtitle}</p></header>"
        f"<main>{body}</main></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f4f6f8; --text: #1b1f24; --dim: #57606a; --line: #d0d7de;
  --s0: #0072b2; --s1: #d55e00; --good: #17703a; --bad: #b3261e; --warn: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1e232a; --text: #e6e9ed; --dim: #9aa4af;
  --line: #3a424c; --s0: #56b4e9; --s1: #e69f00; --good: #5fd38d; --bad: #ff8a80; --warn: #f0c060 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 8px 0 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 28px 0 8px }
h3 { font-size: 1rem; margin: 0 } header p { margin: 4px 0; overflow-wrap: anywhere } a { color: var(--s0) }
.badge { border: 1px solid; border-radius: 9px; padding: 1px 9px; font-weight: 600 }
.finished, .verified { color: var(--good) } .failed, .wrong, .crashed, .no_backward, .timed_out { color: var(--bad) }
.interrupted, .running, .not-started, .out_of_memory, .failed_to_compile { color: var(--warn) }
.unavailable, .not_tried { color: var(--dim) } .reason { font-weight: 600; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 8px }
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
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
thead th { vertical-align: bottom; color: var(--dim) } .number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums } thead .number { white-space: normal } .state { white-space: nowrap }
.op th { padding-top: 14px } .chosen td { font-weight: 600 } td.why { min-width: 240px; font-weight: 400 }
.pairs td { overflow-wrap: anywhere } .pairs th { font-weight: 400; color: var(--dim) }
pre { background: var(--card); border-radius: 8px; padding: 8px 12px; overflow-x: auto; font-size: .82rem }
img { width: 100%; min-width: 760px; background: #fff; border-radius: 8px }
"""
