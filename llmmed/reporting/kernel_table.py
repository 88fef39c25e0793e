"""The table of kernels: every candidate with its verdict, error, time and memory, which one is used and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmmed import consoles
from llmmed.autotune.plan import Candidate, KernelPlan, OpPlan, Status, StepEvidence
from llmmed.errors import UserError
from llmmed.kernels.catalog import DEFAULT
from llmmed.reporting.numbers import ABSENT, Column, digits, number, words

_CHOSEN = "\N{CHECK MARK}"
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


def print_kernel_table(plan: KernelPlan, console: Console) -> None:
    """The table, then what was chosen, in plain words."""
    console.print()
    console.print(kernel_table(plan, gap=1 if console.width < 100 else 2))
    console.print()
    console.print(closing_line(plan), highlight=False)
    console.print()


def main(arguments: Sequence[str]) -> int:
    """Prints the tables of the `kernels.json` that are named, and returns the exit code."""
    errors = consoles.errors()
    if not arguments or any(argument.startswith("-") for argument in arguments):
        errors.print(
            "error: write kernel_table.py <kernels.json>, for instance outputs/2026-01-31/12-00-00/kernels.json"
        )
        return 1
    try:
        for argument in arguments:
            print_kernel_table(KernelPlan.read(Path(argument)), consoles.output())
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
        for candidate_name, candidate in op.candidates.items():
            chosen = candidate_name == op.chosen
            table.add_row(
                Text(f"{_CHOSEN if chosen else ' '} {candidate_name}"),
                Text(words(candidate.status), _STYLES[candidate.status]),
                *(column.value(candidate) or Text(ABSENT, "dim") for column in columns),
                Text(reason_alone(candidate) or ABSENT),
                style="bold" if chosen else "",
            )
    return table


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
