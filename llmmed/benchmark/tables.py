"""A benchmark's rows as tables: for the terminal, and as Markdown for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmmed.benchmark.results import OpRow, OpsResult, Origin, StepResult, StepRow
from llmmed.kernels.catalog import COMPILED, DEFAULT
from llmmed.reporting.numbers import ABSENT, Column, digits, number, words

_GOOD, _IDLE = "green", "dim"
_LONGEST_NAME = 18  # of an implementation, with its indent; a contestant's is folded
_INDENT = (0, 0, 0, 2)
_R = TypeVar("_R", OpRow, StepRow)


def header(origin: Origin) -> str:
    """The machine and the versions, in one line."""
    hardware = origin.hardware
    versions = [f"torch {hardware.torch}", f"triton {hardware.triton}" if hardware.triton else "no triton"]
    versions += [f"driver {hardware.driver}"] if hardware.driver else []
    versions += [f"{name} {version}" for name, version in origin.packages.items() if version]
    return f"{hardware.device}, {', '.join(versions)}"


def show(result: OpsResult | StepResult, console: Console) -> None:
    """Prints a table for each op or model, in 80 columns if need be; below all of them what the columns mean."""
    if isinstance(result, OpsResult):
        for title, ceilings in result.ceilings.items():
            products = "".join(f", {name} products {t:,.0f} TFLOP/s" for name, t in ceilings.product_tflops.items())
            console.print(f"ceilings, {title}: copy {ceilings.copy_gb_per_second:,.0f} GB/s{products}", style=_IDLE)
        for (op, size, _, mode), rows in _grouped(result).items():
            _group(op, f"{size}, {mode}: {rows[0].shapes}", rows, _OPS, console)
    else:
        for shape in result.shapes:
            told = f"{shape.parameters / 1e6:,.1f} M parameters, {shape.tokens}"
            rows_of = by_speed([row for row in result.rows if row.size == shape.size])
            left_out = _INTERVAL if console.width < 110 else _SPREAD
            columns = [column for column in _step_columns(rows_of) if column is not left_out]
            _group(shape.size, f"{told}, {shape.precision}, {shape.optimizer}", rows_of, columns, console)
    console.print(f"\n{note(result)}", style=_IDLE)


def markdown(rows: Sequence[OpRow] | Sequence[StepRow]) -> str:
    """A Markdown table of rows of one kind; those without numbers say why."""
    columns: Sequence[Column[OpRow]] | Sequence[Column[StepRow]]
    if isinstance(rows[0], OpRow):
        columns, first = _OPS, "implementation"
    else:
        rows = by_speed([row for row in rows if isinstance(row, StepRow)])
        columns, first = [column for column in _step_columns(rows) if column is not _SPREAD], "contestant"
    used = [column for column in columns if any(column.value(row) for row in rows)]  # type: ignore[arg-type]
    lines = [
        [first, "verdict", *(column.title for column in used)],
        ["---", "---", *("---:" for _ in used)],
    ]
    for row in rows:
        cells = [column.value(row) or ABSENT for column in used]  # type: ignore[arg-type]
        verdict = words(row.status) + (f": {row.reason}" if row.reason else "")
        lines.append([_name(row), verdict, *cells])
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def by_speed(rows: Sequence[StepRow]) -> list[StepRow]:
    """The fastest first; those without a speed stay in their order."""
    return sorted(rows, key=lambda row: -(row.tokens_per_second or 0.0))


def note(result: OpsResult | StepResult) -> str:
    """What the columns mean, and what must be known to compare the rows."""
    if isinstance(result, StepResult):
        ran = [row for row in result.rows if row.tokens_per_second]
        hugging_face = any(row.contestant.startswith("hf_") for row in ran)
        fused = any((row.kernels or {}).get("swiglu_mlp", DEFAULT) not in (DEFAULT, COMPILED) for row in ran)
        return _STEP_NOTE + (_HUGGING_FACE_NOTE if hugging_face else "") + (_FUSED_MLP_NOTE if fused else "")
    timed = [row for row in result.rows if row.total_ms is not None]
    copied = sorted({row.op for row in timed if row.implementation == "liger" and row.op in _COPIED_FOR_LIGER})
    told = _OPS_NOTE if any(row.on_gpu for row in timed) else _OPS_NOTE_CPU
    return told + (_LIGER_NOTE.format(", ".join(copied)) if copied else "")


_OPS_NOTE = (
    "One call of each shape, forward + backward, every candidate in turns with a cold cache. Device: median time on "
    "the device; host: time to issue the calls; fwd+bwd: what a step pays (in eager mode the longer of the two; in "
    "mode graphs the device's, replayed from CUDA graphs, PyTorch's implementation compiled), with half the 95 % "
    "interval of its median (±); ceiling: least possible device time / measured; memory: peak beyond the inputs."
)
_OPS_NOTE_CPU = (
    "One call of each shape, forward + backward, every candidate in turns. Fwd+bwd: the median time, with half its "
    "95 % interval (±)."
)
_COPIED_FOR_LIGER = ("cross_entropy", "rotary", "swiglu")
_LIGER_NOTE = (
    " Liger's kernels write over what they are given in: {}. They get copies here, as an op may not change its inputs; "
    "these count in its time and memory, and whoever trains with Liger does not make them."
)
_STEP_NOTE = (
    "Every contestant in a process of its own, from the same weights, on the same batches. Speed: the median of "
    "the timed blocks with its 95 % interval (±: half of it), which is that of one process: others, and other "
    "machines, may differ by more; of several rounds, that of their medians, of up to five the range. x plain "
    "compiled: over the fastest compiled step of plain PyTorch. First step: seconds from the start of the process with "
    "empty compiler caches; in brackets in a later round."
)
_HUGGING_FACE_NOTE = (
    " Hugging Face's model gets no mask, since batches are never padded; its residual stream, norms and rotary "
    "positions stay in float32 under autocast."
)
_FUSED_MLP_NOTE = (
    " Where swiglu_mlp has kernels of its own, the device's time in swiglu holds the products that are part of them."
)


def _grouped(result: OpsResult) -> dict[tuple[str, ...], list[OpRow]]:
    """By op, size, dtype and mode."""
    groups: dict[tuple[str, ...], list[OpRow]] = {}
    for row in result.rows:
        groups.setdefault((row.op, row.size, row.dtype, row.mode), []).append(row)
    return groups


def _group(title: str, told: str, rows: Sequence[_R], columns: Sequence[Column[_R]], console: Console) -> None:
    """A heading, a table of the rows that have times, and a line for every reason."""
    console.print(Text.assemble((f"\n{title}", "bold"), (f"  {told}", _IDLE)))
    timed = [row for row in rows if _is_timed(row)]
    used = [column for column in columns if any(column.value(row) for row in timed)]
    table = Table(box=None, padding=(0, 1 if console.width < 110 else 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("verified and timed", overflow="fold", min_width=_LONGEST_NAME)
    for column in used:
        table.add_column(column.header, justify="right", no_wrap=True)
    for row in timed:
        cells = (column.value(row) or Text(ABSENT, _IDLE) for column in used)
        table.add_row(Padding(Text(_name(row)), _INDENT), *cells)
    if timed:
        console.print(table)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason or not _is_timed(row):
            reasons.setdefault(("" if _is_timed(row) else row.status, row.reason), []).append(_name(row))
    for (status, reason), names in reasons.items():
        who = ("; " if any("," in name for name in names) else ", ").join(names)
        verdict = (": ", (words(status), _colour(status))) if status else ()
        line = Text.assemble(who, *verdict, f": {reason}" if reason else "")
        console.print(Padding(line, _INDENT, expand=False))


def _is_timed(row: OpRow | StepRow) -> bool:
    return (row.total_ms if isinstance(row, OpRow) else row.tokens_per_second) is not None


def _name(row: OpRow | StepRow) -> str:
    return row.implementation if isinstance(row, OpRow) else row.title


def _spread(middle: float | None, low: float | None, high: float | None) -> str:
    """Half the interval, in per cent of the median."""
    return "" if not middle or low is None or high is None else f"{50 * (high - low) / middle:.1f}"


def _device_ms(row: OpRow) -> str:
    return digits(row.device_ms) if row.host_ms is not None else ""  # without the host it says the same as the total


def _first_step(row: StepRow) -> str:
    again = f" ({row.first_step_again_seconds:.1f})" if row.first_step_again_seconds is not None else ""
    return "" if row.first_step_seconds is None else f"{row.first_step_seconds:.1f}{again}"


def _speed_interval(row: StepRow) -> str:
    low, high = row.tokens_per_second_low, row.tokens_per_second_high
    return "" if low is None or high is None else f"{low:,.0f}-{high:,.0f}"


_OPS: tuple[Column[OpRow], ...] = (
    Column("relative\nerror", lambda row: number(row.relative_error, ".1e")),
    Column("device\nms", _device_ms),
    Column("host\nms", lambda row: digits(row.host_ms)),
    Column("fwd+bwd\nms", lambda row: digits(row.total_ms)),
    Column("\u00b1\n%", lambda row: _spread(row.total_ms, row.total_ms_low, row.total_ms_high)),
    Column("ceil-\ning", lambda row: number(row.share_of_ceiling, ".2f")),
    Column("memory\nMiB", lambda row: number(row.peak_memory_mib, ",.0f")),
    Column("speed-\nup", lambda row: number(row.speedup, ".2f")),
)
_INTERVAL = Column("95 %\ninterval", _speed_interval)
_SPREAD = Column[StepRow](
    "\u00b1\n%", lambda row: _spread(row.tokens_per_second, row.tokens_per_second_low, row.tokens_per_second_high)
)


def _step_columns(rows: Sequence[StepRow]) -> list[Column[StepRow]]:
    compiled = [row for row in rows if row.contestant.startswith(("plain_compiled", "plain_graphs"))]
    best = max((row.tokens_per_second or 0.0 for row in compiled), default=0.0)

    def ratio(row: StepRow) -> str:
        return f"{row.tokens_per_second / best:.2f}" if row.tokens_per_second and best else ""

    return [
        Column("speed\ntokens/s", lambda row: number(row.tokens_per_second, ",.0f")),
        _INTERVAL,
        _SPREAD,
        Column("x plain\ncompiled", ratio),
        Column("step\nms", lambda row: digits(row.step_ms)),
        Column("MFU\n%", lambda row: "" if row.mfu is None else f"{100 * row.mfu:.1f}"),
        Column("memory\nGiB", lambda row: number(row.peak_memory_gib, ".2f")),
        Column("first\nstep, s", _first_step),
    ]


def _colour(status: str) -> str:
    return {"verified": _GOOD, "unavailable": _IDLE, "not_tried": _IDLE}.get(status, "bold red")
