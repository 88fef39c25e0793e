"""The table of kernels: every candidate with its verdict, error, time and memory, which one is used and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmmed import consoles
from llmmed.autotune.plan import Candidate, KernelPlan, OpPlan, Status, StepEvidence
from llmmed.errors import UserError
from llmmed.kernels.catalog import DEFAULT
from llmmed.reporting.numbers import ABSENT, Column, digits, number, words

_CHOSEN = "\N{CHECK MARK}"
_NARROW = 76  # columns of a terminal; in fewer, reasons have no room beside the numbers
_LEGEND = (
    f"{_CHOSEN} is used. Verdict and error: outputs and every gradient against float64. Time: all calls of a "
    "micro-batch, forward and backward, each op by itself."
)
_LEGEND_OF_MEMORY = " Memory: the most that a call takes beyond its inputs."
_STYLES: Mapping[Status, str] = {
    "verified": "green",
    "unavailable": "dim",
    "not_tried": "dim",
    "wrong": "bold red",
    "no_backward": "red",
    "crashed": "red",
    "timed_out": "red",
    "out_of_memory": "yellow",
    "failed_to_compile": "yellow",
}


def print_kernel_table(plan: KernelPlan, console: Console, *, whole: bool = False) -> None:
    """The table, then what was chosen, in plain words; these alone where nothing was tried, unless `whole`."""
    console.print()
    if whole or any(
        c.status not in ("not_tried", "unavailable") for op in plan.ops.values() for c in op.candidates.values()
    ):
        if console.width < _NARROW:
            _print_narrow(plan, console)
        else:
            console.print(kernel_table(plan, gap=1 if console.width < 100 else 2))
        console.print()
    console.print(closing_line(plan), highlight=False)
    console.print()


def main(arguments: Sequence[str]) -> int:
    """Prints the tables of the plans that are named, or of the runs by their folders, and returns the exit code."""
    errors = consoles.errors()
    if not arguments or any(argument.startswith("-") for argument in arguments):
        errors.print(
            "error: write kernel_table.py <run folder or kernels.json>, for instance outputs/2026-01-31/12-00-00"
        )
        return 1
    try:
        for path in map(Path, arguments):
            print_kernel_table(
                KernelPlan.read(path / "kernels.json" if path.is_dir() else path), consoles.output(), whole=True
            )
    except UserError as error:
        errors.print(f"error: {error}", markup=False)
        return 1
    return 0


def kernel_table(plan: KernelPlan, *, gap: int = 2) -> Table:
    """One row a candidate, grouped by op, the chosen one marked; `gap` blanks between columns.

    A column that nothing has a value for, such as memory on a CPU, is left out.
    """
    candidates = [candidate for op in plan.ops.values() for candidate in op.candidates.values()]
    columns = [column for column in _COLUMNS if any(column.value(c) for c in candidates)]
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("kernel", no_wrap=True)
    table.add_column("verdict", min_width=8, max_width=11)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    for index, (name, op) in enumerate(plan.ops.items()):
        if index:
            table.add_row()
        table.add_row(Text(name, "bold"), Text(calls_of(op), "dim"))
        for label, candidate, reason in _rows(op):
            table.add_row(
                Text(label),
                Text(words(candidate.status), _STYLES[candidate.status]),
                *(column.value(candidate) or Text(ABSENT, "dim") for column in columns),
                Text(reason or ABSENT),
                style="bold" if label.startswith(_CHOSEN) else "",
            )
    return table


def _rows(op: OpPlan) -> Iterator[tuple[str, Candidate, str]]:
    """Each candidate's label, itself and its reason. Several that nobody could try, all for the same reason, are one
    row: on a CPU that is most of them."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, candidate in op.candidates.items():
        if name != op.chosen and candidate.status in ("unavailable", "not_tried"):
            alike.setdefault((candidate.status, candidate.reason), []).append(name)
    for name, candidate in op.candidates.items():
        names = alike.get((candidate.status, candidate.reason), []) if name != op.chosen else []
        if len(names) < 3:
            yield f"{_CHOSEN if name == op.chosen else ' '} {name}", candidate, reason_alone(candidate)
        elif name == names[0]:
            yield f"  {len(names)} others", candidate, f"{reason_alone(candidate)}: {', '.join(names)}"


def _print_narrow(plan: KernelPlan, console: Console) -> None:
    """What the table says, but for errors and memory, with the reasons on lines of their own."""
    for index, (name, op) in enumerate(plan.ops.items()):
        if index:
            console.print()
        console.print(Text.assemble((name, "bold"), (f"  {calls_of(op)}", "dim")))
        for label, candidate, reason in _rows(op):
            facts = [label, words(candidate.status)]
            if candidate.total_ms is not None:
                facts.append(f"{digits(candidate.total_ms)} ms")
            if candidate.speedup is not None:
                facts.append(f"{candidate.speedup:.2f}x")
            console.print(Text("  ".join(facts), "bold" if label.startswith(_CHOSEN) else _STYLES[candidate.status]))
            if reason:
                console.print(Padding(Text(reason), (0, 0, 0, 4)))


def closing_line(plan: KernelPlan) -> str:
    """Which kernels will run, what that is worth, and how it was found; console markup."""
    groups: dict[str, list[str]] = {}
    for name, op in plan.ops.items():
        speedup = op.speedup
        gain = f" ({speedup:.2f}x)" if op.chosen != DEFAULT and speedup is not None else ""
        groups.setdefault(op.chosen, []).append(f"{name}{gain}")
    step = _step_line(plan.step) if plan.step is not None else ""
    if list(groups) == [DEFAULT]:
        groups[DEFAULT] = ["every op"]
    chosen = "; ".join(f"[bold]{escape(name)}[/] for {', '.join(ops)}" for name, ops in groups.items())
    candidates = [candidate for op in plan.ops.values() for candidate in op.candidates.values()]
    if not any(candidate.total_ms for candidate in candidates):
        return f"Chosen: {chosen}.\n{step}[dim]For {plan.mode} mode; nothing was left to measure.[/]"
    found = f"Found in {plan.tuning_seconds:.1f} s{_stages(plan)}{_worth(plan)}"
    source = "From the tuning cache" if plan.cached else found
    legend = _LEGEND
    if any(candidate.peak_memory_mib is not None for candidate in candidates):
        legend += _LEGEND_OF_MEMORY
    return f"Chosen: {chosen}.\n{step}[dim]{source}, for {plan.mode} mode. {legend}[/]"


def _step_line(step: StepEvidence) -> str:
    """What the real step said of the whole plan."""
    default, chosen = step.default, step.chosen
    if chosen.choice == default.choice:
        return f"In the step: {digits(chosen.ms)} ms a step.{_ended(step)}\n"
    others = {op: name for op, name in default.choice.items() if name != DEFAULT}
    against = "PyTorch's" if not others else f"PyTorch's and {', '.join(f'{n} for {op}' for op, n in others.items())}"
    text = f"In the step: {digits(chosen.ms)} ms a step; {digits(default.ms)} with {against}"
    if default.peak_memory_gib is not None and chosen.peak_memory_gib is not None:
        text += f"; {chosen.peak_memory_gib:.2f} GiB against {default.peak_memory_gib:.2f}"
    modes = ", ".join(f"{mode} {digits(ms)}" for mode, ms in step.modes.items() if mode != step.mode)
    text += f" ({step.mode}; {modes} ms)" if modes else ""
    return f"{text}.{_ended(step)}\n"


def _ended(step: StepEvidence) -> str:
    return "" if step.finished else " kernels.budget_seconds ended the trials."


def _stages(plan: KernelPlan) -> str:
    """Where the time went, by stage; what took less than a second is not told."""
    told = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in plan.tuning_stages.items() if seconds >= 1)
    return f" ({told})" if told else ""


def _worth(plan: KernelPlan) -> str:
    """How many steps save what the search took: a single shorter run would be over sooner without it."""
    gain_ms = 0.0 if plan.step is None else plan.step.default.ms - plan.step.chosen.ms
    if gain_ms <= 0:
        return ""
    steps = math.ceil(plan.tuning_seconds * 1000 / gain_ms)
    return f", won back in {steps:,} steps of this run and later ones"


_COLUMNS: tuple[Column[Candidate], ...] = (
    Column("relative\nerror", lambda c: number(c.relative_error, ".1e")),
    Column("fwd+bwd\nms", lambda c: digits(c.total_ms)),
    Column("memory\nMiB", lambda c: number(c.peak_memory_mib, ",.0f")),
    Column("speed-\nup", lambda c: number(c.speedup, ".2f")),
)


def calls_of(op: OpPlan) -> str:
    """`12 calls`, of a micro-batch."""
    count = sum(call.count for call in op.calls)
    return f"{count} call{'s' if count != 1 else ''}"


def reason_alone(candidate: Candidate) -> str:
    """The reason without the verdict, which has a column of its own."""
    return candidate.reason.removeprefix(words(candidate.status)).lstrip(":, ")
