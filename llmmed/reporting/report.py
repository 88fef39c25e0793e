"""`report.html` in a run's or a sweep's folder: one file that needs nothing else, no script and no network.

Made from what lies in the folder, so that failed and unfinished runs have a report too.
"""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from llmmed import consoles
from llmmed.autotune.plan import Candidate, KernelPlan
from llmmed.errors import UserError
from llmmed.files import read_metrics, write_atomically
from llmmed.reporting import sweep_summary
from llmmed.reporting.kernel_table import calls_of, reason_alone
from llmmed.reporting.numbers import ABSENT, Column, digits, number, words
from llmmed.reporting.report_html import chart, page, pre, table
from llmmed.reporting.report_step import step_section
from llmmed.reporting.sweep_summary import JobSummary, metrics_of, stored, summarize_run, told_kernels
from llmmed.reporting.terminal import kernels_in_words
from llmmed.run_folder import shown

_LOG_LINES = 40
_EARLIER_SAMPLES = 12  # of a prompt


def main(arguments: Sequence[str]) -> int:
    """Writes the reports of the folders named, prints where they are, and returns the exit code."""
    console, errors = consoles.output(), consoles.errors()
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
        content = sweep_page(folder, jobs)
    elif (folder / ".hydra").is_dir() or (folder / "status.json").exists():
        content = run_page(folder)
    else:
        raise UserError(f"{folder}: that is no run folder and no sweep; it has neither status.json nor jobs in it")
    write_atomically(folder / "report.html", content)
    return folder / "report.html"


def run_page(folder: Path) -> str:
    """The report of one run, as HTML."""
    run = summarize_run(folder)
    sections = {
        "Result": _result(run, folder),
        "Curves": _curves(folder),
        "Step": step_section(folder),
        "Kernels": _kernels(folder),
        "Samples": _samples(folder),
        "Reproduce": _reproduce(folder),
        "Configuration": _configuration(folder),
        "Environment": _environment(folder),
        "Log": _log(folder),
    }
    badge = f'<span class="badge {run.status.replace(" ", "-")}">{run.status}</span>'
    subtitle = f'{badge} {escape(run.job)}</p><p class="where">{escape(_where(folder))}'
    sweep = _sweep_of(folder)
    title = (
        f"Run {folder.resolve().name}" if sweep is None else f"A job of sweep {sweep.name}"
    )  # named by its overrides
    return page(title, subtitle, sections)


def sweep_page(folder: Path, jobs: Sequence[JobSummary]) -> str:
    """The report of a sweep, as HTML: the comparison that `sweep_summary` wrote beside it."""
    columns = sweep_summary.columns(jobs)
    troubled = any(job.reason for job in jobs)
    rows = []
    for job in jobs:
        name = escape(job.job)
        linked = f'<a href="{quote(job.folder)}/report.html">{name}</a>' if job.folder else name
        cells = [f"<td>{linked}</td>", f'<td class="state {job.status.replace(" ", "-")}">{job.status}</td>']
        cells += [f'<td class="number">{column.value(job) or ABSENT}</td>' for column in columns]
        cells.append(f"<td>{escape(told_kernels(job.kernels))}</td>")
        cells += [f'<td class="why">{escape(job.reason or "")}</td>'] if troubled else []
        rows.append(f"<tr>{''.join(cells)}</tr>")
    headers = ["job", "status", *(column.title for column in columns), "kernels other than pytorch"]
    headers += ["reason"] if troubled else []
    pictures = {"The jobs side by side": "sweep_summary.png", "Validation loss against the step": "sweep_curves.png"}
    sections = {
        "Comparison": table(headers, rows, numbers=range(2, 2 + len(columns))) + f"<p>{sweep_summary.UNITS}</p>",
        **{title: _picture(title, folder / name) for title, name in pictures.items() if (folder / name).exists()},
    }
    done = sum(job.status == "finished" for job in jobs)
    return page(f"Sweep {folder.resolve().name}", f"{done} of {len(jobs)} jobs finished", sections)


def _sweep_of(folder: Path) -> Path | None:
    """The folder of the sweep that a run was part of, however deep a job's name made its own."""
    return next((parent for parent in folder.resolve().parents[:3] if (parent / "multirun.yaml").exists()), None)


def _picture(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="scroll"><img alt="{escape(title)}" src="data:image/png;base64,{data}"></div>'


def _where(folder: Path) -> str:
    """The device, the versions and when it was, in one line."""
    environment = stored(folder / "env.json")
    try:
        hardware = KernelPlan.read(folder / "kernels.json").hardware
        told = [hardware.device, f"torch {hardware.torch}", f"triton {hardware.triton}" if hardware.triton else ""]
    except UserError:
        told = []
    started = str(environment.get("started") or "")
    return ", ".join(filter(None, [*told, f"started {started[:16].replace('T', ' ')} UTC" if started else ""]))


def _headline(folder: Path) -> str:
    """The kernels in words, and what they are worth in the real step."""
    try:
        plan = KernelPlan.read(folder / "kernels.json")
    except UserError:
        return ""
    text = f"Kernels: {kernels_in_words(plan.choice)}."
    if plan.step is not None and plan.step.chosen.choice != plan.step.default.choice:
        gain = plan.step.default.ms / plan.step.chosen.ms
        text += f" In the step {gain:.2f} times as fast as PyTorch's."
    return f"<p>{escape(text)}</p>"


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
        ("training time", run.training_time_seconds, ",.1f", "s"),
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
    parts.append(f'<div class="tiles">{tiles}</div>' if tiles else "<p>No numbers were written.</p>")
    return "".join(parts) + _headline(folder)


def _curves(folder: Path) -> str:
    metrics = metrics_of(folder)

    def series(key: str) -> list[tuple[float, float]]:
        found = [(float(m["step"]), float(m[key])) for m in metrics if isinstance(m.get(key), int | float)]
        return [(x, y) for x, y in found if math.isfinite(y)]

    speed = [(x, y) for x, y in series("tokens_per_second") if y > 0]
    charts = [
        chart("loss (nats a token)", {"training": series("loss"), "validation": series("val/loss")}),
        chart("throughput (tokens/s)", {"throughput": speed}, from_zero=True),
        chart("gradient norm", {"gradient norm": series("grad_norm")}),
        chart("learning rate", {"learning rate": series("lr")}, from_zero=True),
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
        title = f"{escape(name)} <i>{calls_of(op)} a micro-batch</i>"
        rows.append(f'<tr class="op"><th colspan="{len(columns) + 3}">{title}</th></tr>')
        for implementation, candidate in op.candidates.items():
            chosen = implementation == op.chosen
            cells = [f"<td>{'&#10003; ' if chosen else ''}{escape(implementation)}</td>"]
            cells.append(f'<td class="{candidate.status}">{words(candidate.status)}</td>')
            cells += [f'<td class="number">{column.value(candidate) or ABSENT}</td>' for column in columns]
            cells.append(f'<td class="why">{escape(reason_alone(candidate)) or ABSENT}</td>')
            idle = candidate.status in ("unavailable", "not_tried")
            rows.append(f'<tr class="{"chosen" if chosen else "idle" if idle else ""}">{"".join(cells)}</tr>')
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
    return f"<p>{escape(text)}</p>{table(headers, rows, numbers=range(2, 2 + len(columns)))}"


def _samples(folder: Path) -> str:
    """The last text of every prompt, and how it came to that, step by step."""
    try:
        found = [s for s in read_metrics(folder / "samples.jsonl") if isinstance(s, dict)]
    except (OSError, UnicodeDecodeError):
        found = []
    samples = [(s.get("step"), str(s.get("prompt", "")), str(s.get("text", ""))) for s in found]
    if not samples:
        return "<p>No text was written: <code>train.sample_every</code> says after how many steps.</p>"
    parts = []
    for prompt in dict.fromkeys(prompt for _, prompt, _ in samples):
        *earlier, last = [
            f"<p><i>step {step}</i> <b>{escape(prompt)}</b>{escape(text)}</p>"
            for step, p, text in samples
            if p == prompt
        ]
        shown = earlier[:: max(1, math.ceil(len(earlier) / _EARLIER_SAMPLES))]
        parts.append(f"<div>{last}")
        if shown:
            parts.append(
                f"<details><summary>earlier, {len(shown)} of {len(earlier)}</summary>{''.join(shown)}</details>"
            )
        parts.append("</div>")
    return f'<div class="samples">{"".join(parts)}</div>'


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
    text = "<p>The same configuration, tuned anew where it runs:</p>" + pre("\n".join(lines))
    if (folder / "kernels.json").exists():
        plan = folder.resolve() / "kernels.json"
        text += "<p>With this run's kernels, verified again:</p>" + pre(shlex.join([*command, f"kernels.plan={plan}"]))
    changed = (environment.get("git") or {}).get("changed_files")
    if changed:
        files = "1 file" if len(changed) == 1 else f"{len(changed)} files"
        text += f"<p>The source was not that of the commit: {files} had changes.</p>"
        text += pre("\n".join(map(str, changed)))
    if isinstance(given := environment.get("command"), list) and _sweep_of(folder) is None:
        where = escape(str(environment.get("working_folder")))
        text += f"<p>What was typed, in <code>{where}</code>:</p>" + pre(shlex.join(map(str, given)))
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
        f"<div><h3>{escape(name)}</h3>{pre(OmegaConf.to_yaml(OmegaConf.create(group)).rstrip())}</div>"
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
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(str(value)) if value else ABSENT}</td></tr>"
        for name, value in rows.items()
    )
    return f'<div class="scroll"><table class="pairs">{lines}</table></div>'


def _log(folder: Path) -> str:
    try:
        lines = (folder / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    note = f"<p>The last of {len(lines)} lines of <code>train.log</code>.</p>" if len(lines) > _LOG_LINES else ""
    return note + pre("\n".join(lines[-_LOG_LINES:])) if lines else "<p>The log is empty or not there.</p>"


def _interval(candidate: Candidate) -> str:
    if candidate.total_ms_low is None or candidate.total_ms_high is None:
        return ""
    return f"{digits(candidate.total_ms_low)}\N{EN DASH}{digits(candidate.total_ms_high)}"


_COLUMNS: tuple[Column[Candidate], ...] = (
    Column("relative error", lambda c: number(c.relative_error, ".1e")),
    Column("error / allowed", lambda c: number(c.worst_ratio, ".2g")),
    Column("forward, ms", lambda c: digits(c.forward_ms)),
    Column("backward, ms", lambda c: digits(c.backward_ms)),
    Column("total, ms", lambda c: digits(c.total_ms)),
    Column("interval, ms", _interval),
    Column("memory, MiB", lambda c: number(c.peak_memory_mib, ",.0f")),
    Column("share of ceiling", lambda c: number(c.share_of_ceiling, ".0%")),
    Column("speed-up over pytorch", lambda c: number(c.speedup, ".2f")),
)
