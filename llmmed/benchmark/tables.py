"""A benchmark's rows as tables: for the terminal, and as Markdown for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmmed.benchmark.results import OpRow, OpsResult, Origin, StepResult, StepRow

_ABSENT = "\N{EN DASH}"
_GOOD, _IDLE = "green", "dim"
_R = TypeVar("_R", OpRow, StepRow)


@dataclass(frozen=True)
class Column(Generic[_R]):
    """A number of every row; its header has the unit, in two lines. Empty text if absent."""

    header: str
    value: Callable[[_R], str]

    @property
    def title(self) -> str:
        """The header in one line."""
        return self.header.replace("-\n", "").replace("\n", " ")


def header(origin: Origin) -> str:
    """The machine and the versions, in one line."""
    hardware = origin.hardware
    versions = [f"torch {hardware.torch}", f"triton {hardware.triton}" if hardware.triton else "no triton"]
    versions += [f"driver {hardware.driver}"] if hardware.driver else []
    versions += [f"{name} {version}" for name, version in origin.packages.items() if version]
    return f"{hardware.device}, {', '.join(versions)}"


def show(result: OpsResult | StepResult, console: Console) -> None:
    """Prints the table; below it what the columns mean."""
    narrow = console.width < 110
    if isinstance(result, OpsResult):
        console.print(_ops_table(result, gap=1 if narrow else 2))
        for title, ceilings in result.ceilings.items():
            products = "".join(f", {name} products {t:,.0f} TFLOP/s" for name, t in ceilings.product_tflops.items())
            console.print(f"\nceilings, {title}: copy {ceilings.copy_gb_per_second:,.0f} GB/s{products}", style="dim")
        console.print(f"\n{OPS_NOTE}", style="dim")
    else:
        console.print(_step_table(result, gap=1 if narrow else 2))
        console.print(f"\n{STEP_NOTE}", style="dim")


def markdown(rows: Sequence[OpRow] | Sequence[StepRow]) -> str:
    """A Markdown table of rows of one kind; those without numbers say why."""
    columns: Sequence[Column[OpRow]] | Sequence[Column[StepRow]]
    if isinstance(rows[0], OpRow):
        columns, first = _OPS, "implementation"
    else:
        columns, first = _STEP, "contestant"
    used = [column for column in columns if any(column.value(row) for row in rows)]  # type: ignore[arg-type]
    lines = [
        [first, "verdict", *(column.title for column in used)],
        ["---", "---", *("---:" for _ in used)],
    ]
    for row in rows:
        cells = [column.value(row) or _ABSENT for column in used]  # type: ignore[arg-type]
        name = row.implementation if isinstance(row, OpRow) else row.title
        verdict = _words(row.status) + (f": {row.reason}" if row.reason else "")
        lines.append([name, verdict, *cells])
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


OPS_NOTE = (
    "One call of each shape, forward + backward, every candidate in turns with a cold cache. Device: median time on "
    "the device; host: time to issue the calls; fwd+bwd: what a step pays (in eager mode the longer of the two), with "
    "half the 95 % interval of its median; ceiling: least possible device time / measured; memory: peak beyond the "
    "inputs."
)
STEP_NOTE = (
    "Every contestant in a process of its own, from the same weights, on the same batches. Speed: the median of all "
    "timed blocks with its 95 % interval. First step: seconds from the start of the process, with empty compiler "
    "caches; in brackets in a later round."
)


def _ops_table(result: OpsResult, *, gap: int) -> Table:
    columns = [column for column in _OPS if any(column.value(row) for row in result.rows)]
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("op", no_wrap=True)
    table.add_column("verdict", min_width=8, max_width=11)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    before: tuple[str, ...] = ()
    for row in result.rows:
        group = (row.op, row.size, row.dtype, row.mode)
        if group != before:
            if before:
                table.add_row()
            table.add_row(Text(row.op, "bold"), Text(row.size, _IDLE), *("" for _ in columns), Text(_where(row), _IDLE))
            before = group
        table.add_row(
            f"  {row.implementation}",
            Text(_words(row.status), _colour(row.status)),
            *(column.value(row) or Text(_ABSENT, _IDLE) for column in columns),
            Text(row.reason),
        )
    return table


def _step_table(result: StepResult, *, gap: int) -> Table:
    columns = [column for column in _STEP if any(column.value(row) for row in result.rows)]
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("contestant", overflow="fold", min_width=18)
    table.add_column("verdict", min_width=8, max_width=11)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    for shape in result.shapes:
        told = f"{shape.parameters / 1e6:,.1f} M parameters, {shape.batch} x {shape.seq_len} tokens, {shape.precision}"
        table.add_row(Text(shape.size, "bold"), "", *("" for _ in columns), Text(f"{told}, {shape.optimizer}", _IDLE))
        for row in result.rows:
            if row.size == shape.size:
                table.add_row(
                    Text(f"  {row.title}"),
                    Text(_words(row.status), _colour(row.status)),
                    *(column.value(row) or Text(_ABSENT, _IDLE) for column in columns),
                    Text(row.reason),
                )
    return table


def _where(row: OpRow) -> str:
    return f"{row.shapes}; {row.mode}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def milliseconds(value: float | None) -> str:
    """Three significant digits without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4f}" if value < 0.1 else f"{value:#.3g}"


def _spread(row: OpRow) -> str:
    """Half the interval, in per cent of the median."""
    if not row.total_ms or row.total_ms_low is None or row.total_ms_high is None:
        return ""
    return f"{50 * (row.total_ms_high - row.total_ms_low) / row.total_ms:.1f}"


def _device_ms(row: OpRow) -> str:
    return milliseconds(row.device_ms) if row.host_ms is not None else ""  # on a CPU it says the same as the total


def _first_step(row: StepRow) -> str:
    again = f" ({row.first_step_again_seconds:.1f})" if row.first_step_again_seconds is not None else ""
    return "" if row.first_step_seconds is None else f"{row.first_step_seconds:.1f}{again}"


def _speed_interval(row: StepRow) -> str:
    low, high = row.tokens_per_second_low, row.tokens_per_second_high
    return "" if low is None or high is None else f"{low:,.0f}-{high:,.0f}"


_OPS: tuple[Column[OpRow], ...] = (
    Column("relative\nerror", lambda row: _number(row.relative_error, ".1e")),
    Column("device\nms", _device_ms),
    Column("host\nms", lambda row: milliseconds(row.host_ms)),
    Column("fwd+bwd\nms", lambda row: milliseconds(row.total_ms)),
    Column("\u00b1\n%", _spread),
    Column("of\nceiling", lambda row: _number(row.share_of_ceiling, ".2f")),
    Column("memory\nMiB", lambda row: _number(row.peak_memory_mib, ",.0f")),
    Column("speed-\nup", lambda row: _number(row.speedup, ".2f")),
)
_STEP: tuple[Column[StepRow], ...] = (
    Column("speed\ntokens/s", lambda row: _number(row.tokens_per_second, ",.0f")),
    Column("95 %\ninterval", _speed_interval),
    Column("step\nms", lambda row: milliseconds(row.step_ms)),
    Column("MFU\n%", lambda row: "" if row.mfu is None else f"{100 * row.mfu:.1f}"),
    Column("memory\nGiB", lambda row: _number(row.peak_memory_gib, ".2f")),
    Column("first\nstep, s", _first_step),
)


def _words(status: str) -> str:
    return status.replace("_", " ")


def _colour(status: str) -> str:
    return {"verified": _GOOD, "unavailable": _IDLE, "not_tried": _IDLE}.get(status, "bold red")
