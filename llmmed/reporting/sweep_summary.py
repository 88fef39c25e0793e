"""The comparison that ends a sweep: one row a job, on the terminal and as `sweep_summary.{csv,md,json,png}`.

Read from the job folders alone, so that it can be told of a finished, a running and a broken sweep.
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmmed import run_folder, sweep
from llmmed.autotune.plan import KernelPlan
from llmmed.errors import UserError
from llmmed.files import read_json, read_metrics, write_atomically, write_json
from llmmed.kernels.catalog import DEFAULT
from llmmed.reporting import sweep_curves
from llmmed.reporting.drawing import BLUE, RED, folded
from llmmed.reporting.numbers import ABSENT, Column, number

UNITS = "Losses in nats a token; memory is the allocator's peak; the first step's time is counted from the start."


@dataclass(frozen=True)
class JobSummary:
    """What one run came to. Of a run that did not finish, the numbers are the last that it wrote.

    Its speed and MFU are those of the median interval, as a finished run's are.
    """

    job: str  # its overrides, for people
    folder: str  # relative to the sweep's folder
    status: Literal["finished", "failed", "interrupted", "running", "not started"]
    reason: str | None = None
    kernels: dict[str, str] | None = None  # op -> implementation where that is not PyTorch's; None: not chosen yet
    steps: int | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_memory_gib: float | None = None
    train_loss: float | None = None  # nats a token
    val_loss: float | None = None
    time_to_first_step_seconds: float | None = None
    training_time_seconds: float | None = None


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep's jobs and is no run folder itself."""
    return not (folder / ".hydra").exists() and ((folder / "multirun.yaml").exists() or any(_job_folders(folder)))


def tell(folder: Path, console: Console) -> list[JobSummary]:
    """Prints the table of a sweep and writes its files into the sweep's folder. Raises `OSError`."""
    jobs = summarize_sweep(folder)
    done = sum(job.status == "finished" for job in jobs)
    console.print(f"\nsweep: {done} of {len(jobs)} jobs finished\n")
    console.print(table(jobs))
    troubled = [job for job in jobs if job.status != "finished"]
    if troubled:
        console.print()
    for job in troubled:
        where = f" ({run_folder.shown(folder / job.folder)})" if job.folder else ""
        console.print(f"{job.status}: {job.job}: {job.reason or 'no reason is known'}{where}", markup=False)
    write(jobs, folder)
    console.print(f"\ncomparison in {run_folder.shown(folder)}/sweep_summary.csv, .md, .json and .png", markup=False)
    if (folder / "sweep_curves.png").exists():
        console.print(f"validation losses in {run_folder.shown(folder)}/sweep_curves.png", markup=False)
    return jobs


def summarize_sweep(folder: Path) -> list[JobSummary]:
    """One summary a job, in the order of the sweep; those that were planned and never started come last."""
    overrides = {path: _overrides(path) for path in _job_folders(folder)}
    planned = _planned(folder)
    missing = [job for job in planned if job not in overrides.values()]
    order = {tuple(job): place for place, job in enumerate(planned)}
    paths = sorted(overrides, key=lambda path: (order.get(tuple(overrides[path]), len(order)), str(path)))
    names = sweep.names_of([*(overrides[path] for path in paths), *missing])
    found = [
        replace(summarize_run(path), job=name, folder=str(path.relative_to(folder)))
        for path, name in zip(paths, names[: len(paths)], strict=True)
    ]
    reason = "the sweep ended before it; the same command with hydra.sweep.dir=<this folder> runs what is missing"
    return found + [JobSummary(name, "", "not started", reason) for name in names[len(paths) :]]


def summarize_run(folder: Path) -> JobSummary:
    """Out of a run folder, with whatever is there."""
    status = status_of(folder)
    state = "not started" if status.state == "none" else status.state
    job = JobSummary(" ".join(_overrides(folder)) or "no overrides", "", state, status.reason, _kernels(folder))
    if state == "finished" and (values := stored(folder / "summary.json")):
        return replace(
            job,
            steps=values.get("steps"),
            tokens_per_second=values.get("tokens_per_second"),
            mfu=values.get("mfu"),
            peak_memory_gib=values.get("peak_memory_gib"),
            train_loss=values.get("final/train_loss"),
            val_loss=values.get("final/val_loss"),
            time_to_first_step_seconds=values.get("time_to_first_step_seconds"),
            training_time_seconds=values.get("training_time_seconds"),
        )
    metrics = metrics_of(folder)
    last: dict[str, Any] = {key: value for entry in metrics for key, value in entry.items()}
    return replace(
        job,
        steps=last.get("step"),
        tokens_per_second=_median(metrics, "tokens_per_second"),
        mfu=_median(metrics, "mfu"),  # proportional to the speed, so that of the median speed
        peak_memory_gib=last.get("memory_gib"),
        train_loss=last.get("loss"),
        val_loss=last.get("val/loss"),
    )


def status_of(folder: Path) -> run_folder.Status:
    """The run's status; one that says `running` although its process is gone from this machine has failed."""
    status = run_folder.read_status(folder)
    here = stored(folder / "env.json").get("host") == platform.node()
    if status.state == "running" and here and status.pid is not None and not _alive(status.pid):
        reason = f"its process ended without a word after {status.updated}: killed, or the machine went down"
        return replace(status, state="failed", reason=reason)
    return status


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """`metrics.jsonl`, as far as it can be read."""
    try:
        return [
            entry for entry in read_metrics(folder / "metrics.jsonl") if isinstance(entry, dict) and "step" in entry
        ]
    except (OSError, UnicodeDecodeError):
        return []


def stored(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where it is missing or damaged."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def table(jobs: Sequence[JobSummary]) -> Table:
    """For the terminal. A column that no job has a value for is left out."""
    shown = columns(jobs)
    found = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    found.add_column("job", overflow="fold", min_width=12)
    found.add_column("status", no_wrap=True)
    for column in shown:
        found.add_column(column.header, justify="right", no_wrap=True)
    found.add_column("kernels other than pytorch", overflow="fold", min_width=10)
    for job in jobs:
        colour = {"finished": "green", "failed": "bold red"}.get(job.status, "yellow")
        cells = [Text(column.value(job) or ABSENT) for column in shown]
        found.add_row(Text(job.job), Text(job.status, colour), *cells, Text(told_kernels(job.kernels)))
    return found


def columns(jobs: Sequence[JobSummary]) -> list[Column[JobSummary]]:
    """The numbers of a comparison, without those that no job has."""
    return [column for column in _COLUMNS if any(column.value(job) for job in jobs)]


def told_kernels(kernels: dict[str, str] | None) -> str:
    """`triton: rms_norm, rotary; cudnn: attention`."""
    if not kernels:
        return ABSENT if kernels is None else "none"
    names = dict.fromkeys(kernels.values())
    return "; ".join(f"{name}: {', '.join(op for op, n in kernels.items() if n == name)}" for name in names)


def write(jobs: Sequence[JobSummary], folder: Path) -> None:
    """`sweep_summary.json`, `.csv`, `.md` and `.png`, and `sweep_curves.png`, each whole or not at all."""
    rows = [asdict(job) for job in jobs]
    finite = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # JSON has no NaN
    write_json(folder / "sweep_summary.json", finite)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(JobSummary.__dataclass_fields__))
    writer.writeheader()
    writer.writerows(row | {"kernels": told_kernels(row["kernels"])} for row in rows)
    write_atomically(folder / "sweep_summary.csv", text.getvalue())
    write_atomically(folder / "sweep_summary.md", _markdown(jobs))
    write_atomically(folder / "sweep_summary.png", _picture(jobs))
    curves = sweep_curves.picture({job.job: losses_of(folder / job.folder) for job in jobs if job.folder})
    if curves is not None:
        write_atomically(folder / "sweep_curves.png", curves)


def losses_of(folder: Path) -> list[tuple[float, float]]:
    """(step, validation loss in nats a token), one point a step, of a run that may have been resumed."""
    return list({e["step"]: (e["step"], e["val/loss"]) for e in metrics_of(folder) if "val/loss" in e}.values())


_COLUMNS: tuple[Column[JobSummary], ...] = (
    Column("speed\ntokens/s", lambda job: number(job.tokens_per_second, ",.0f")),
    Column("MFU\n%", lambda job: "" if job.mfu is None else f"{100 * job.mfu:.1f}"),
    Column("memory\nGiB", lambda job: number(job.peak_memory_gib, ".2f")),
    Column("train\nloss", lambda job: number(job.train_loss, ".4f")),
    Column("val\nloss", lambda job: number(job.val_loss, ".4f")),
    Column("first\nstep, s", lambda job: number(job.time_to_first_step_seconds, ".1f")),
)


def _markdown(jobs: Sequence[JobSummary]) -> str:
    headers = ["job", "status", *(column.title for column in _COLUMNS), "kernels other than pytorch", "reason"]
    lines = [headers, ["---", "---", *("---:" for _ in _COLUMNS), "---", "---"]]
    for job in jobs:
        cells = [column.value(job) or ABSENT for column in _COLUMNS]
        lines.append([job.job, job.status, *cells, told_kernels(job.kernels), job.reason or ""])
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines) + (
        f"\n{UNITS}\n"
    )


def _picture(jobs: Sequence[JobSummary]) -> bytes:
    """Bars, one panel a quantity; losses as points, since their zero says nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, ScalarFormatter

    panels = [
        ("throughput (tokens/s)", [job.tokens_per_second for job in jobs], True, ",.0f"),
        ("peak memory (GiB)", [job.peak_memory_gib for job in jobs], True, ".2f"),
        ("validation loss (nats a token)", [job.val_loss for job in jobs], False, ".4f"),
        ("time to first step (s)", [job.time_to_first_step_seconds for job in jobs], True, ".1f"),
    ]
    shown = [panel for panel in panels if any(map(_drawable, panel[1]))] or panels[:1]
    size = (2.5 + 3.0 * len(shown), min(1.4 + 0.45 * len(jobs), 60.0))
    figure, axes = pyplot.subplots(1, len(shown), figsize=size, sharey=True, squeeze=False, layout="constrained")
    labels = [folded(job.job if job.status == "finished" else f"{job.job}\n{job.status}", 36) for job in jobs]
    for axis, (title, values, bars, form) in zip(axes[0], shown, strict=True):
        highest = max((value for value in values if value is not None and math.isfinite(value)), default=1.0)
        for row, (job, value) in enumerate(zip(jobs, values, strict=True)):
            colour = BLUE if job.status == "finished" else RED
            hatch = None if job.status == "finished" else "//"
            if value is None or not math.isfinite(value):
                axis.text(0.02, row, ABSENT, transform=axis.get_yaxis_transform(), va="center", color="0.4")
            elif bars:
                axis.barh(row, value, 0.6, color=colour, hatch=hatch, edgecolor="white")
                axis.text(value + 0.02 * highest, row, f"{value:{form}}", va="center", fontsize=8)
            else:
                axis.plot([value], [row], "o" if hatch is None else "x", color=colour, markersize=7)
                axis.annotate(f"{value:{form}}", (value, row), (0, 7), textcoords="offset points", ha="center", size=8)
        axis.locator_params(axis="x", nbins=4)
        finite = [value for value in values if value is not None and math.isfinite(value)]
        if bars:
            axis.set_xlim(0, 1.25 * highest)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:,.6g}"))
        elif finite:
            axis.set_xlim(*sweep_curves.widened(min(finite), max(finite), 0.25))
            axis.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axis.set_xlabel(title)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(jobs)), labels)
    axes[0][0].set_ylim(len(jobs) - 0.5, -0.5)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    return picture.getvalue()


def _drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _median(metrics: Sequence[dict[str, float]], key: str) -> float | None:
    """Over the intervals in which something was trained."""
    values = [entry[key] for entry in metrics if entry.get(key)]
    return statistics.median(values) if values else None


def _job_folders(folder: Path) -> Iterator[Path]:
    return (path.parent.parent for path in folder.rglob(".hydra/overrides.yaml") if path.parent.parent != folder)


def _overrides(folder: Path) -> list[str]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
    except (OSError, ValueError, OmegaConfBaseException):
        return []
    return [str(override) for override in found] if isinstance(found, list) else []


def _planned(folder: Path) -> list[list[str]]:
    """The overrides of every job of the sweep's last command, if that can be told."""
    try:
        stored = OmegaConf.load(folder / "multirun.yaml")
        return sweep.jobs_of(stored.hydra)
    except (OSError, TypeError, ValueError, HydraException, OmegaConfBaseException):
        return []


def _kernels(folder: Path) -> dict[str, str] | None:
    try:
        choice = KernelPlan.read(folder / "kernels.json").choice
    except UserError:
        return None
    return {op: name for op, name in choice.items() if name != DEFAULT}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
