"""The verdicts of the gate as a table, for the author of a kernel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmmed import consoles
from llmmed.autotune.verify import Verdict
from llmmed.errors import UserError
from llmmed.kernels.catalog import implementation_names, op_names
from llmmed.kernels.operator import INTERPRETED
from llmmed.reporting.numbers import number, words
from llmmed.reporting.verdict_pool import Task, VerdictPool
from llmmed.reporting.verdict_worker import device_of_verdicts
from llmmed.signals import INTERRUPTED, StopRequest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KEYS = ("op", "impl", "dtype", "seeds", "random", "workers")
_POLL_SECONDS = 0.005
_FAILED = ("wrong", "no_backward", "crashed", "failed_to_compile", "out_of_memory", "timed_out")


@dataclass(frozen=True)
class Request:
    """What to verify. `named`: the user asked for these implementations, so one that is unavailable is a failure.
    `random`: at how many random shapes besides the cases. `workers`: in how many processes, if the user said so."""

    tasks: tuple[Task, ...]
    seeds: int
    named: bool
    random: int = 0
    workers: int | None = None


def main(arguments: Sequence[str]) -> int:
    """Verifies, prints, and returns the exit code: 1 if anything is wrong or the arguments are, 130 if a signal came
    before all was verified."""
    console = consoles.output()
    device = device_of_verdicts()
    try:
        request = parse(arguments, device)
    except UserError as error:
        consoles.errors().print(f"error: {error}", markup=False)
        return 1
    rows = _Rows(console, request.tasks)
    with StopRequest() as stop:
        stop.waits = True
        started = VerdictPool.started(request.tasks, request.workers, request.seeds, request.random, device)
        with console.status("verifying") as status, started as pool:
            while not pool.is_done and stop.name is None:
                for place, verdict in pool.look():
                    rows.add(place, verdict)
                status.update(f"{rows.decided} of {len(request.tasks)} decided{_told('verifying', pool.under_way())}")
                time.sleep(_POLL_SECONDS)
            stop.settle()
            left = _told("under way", pool.under_way())
        rows.add_held()
        if rows.decided < len(request.tasks):
            told = f"{rows.decided} of {len(request.tasks)} decided, the rest was not verified{left}"
            console.print(f"interrupted by {stop.name}: {told}", markup=False, soft_wrap=True)
            return INTERRUPTED
    if device.type == "cpu" and not INTERPRETED:
        console.print("\nThere is no GPU here; TRITON_INTERPRET=1 runs Triton kernels on the CPU, slowly, in float32.")
    return 1 if rows.failed(request.named) else 0


def parse(arguments: Sequence[str], device: torch.device) -> Request:
    """`op=a,b impl=c dtype=float32 seeds=3 random=100 workers=4`. Raises `UserError`."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in _KEYS or not equals or not value:
            keys = ", ".join(f"{each}=..." for each in _KEYS)
            raise UserError(f"'{argument}': write {keys}; nothing verifies everything")
        given[key] = value
    ops = given["op"].split(",") if "op" in given else list(op_names())
    wanted = given["impl"].split(",") if "impl" in given else None
    for op in ops:
        if op not in op_names():
            raise UserError(f"op={op}: there is no such op; the ops are {', '.join(op_names())}")
    candidates = [(op, n) for op in ops for n in implementation_names(op) if wanted is None or n in wanted]
    missing = set(wanted or ()) - {name for _, name in candidates}
    if missing:
        known = sorted({name for op in ops for name in implementation_names(op)})
        raise UserError(f"impl={', '.join(sorted(missing))}: no such implementation; there are {', '.join(known)}")
    # Without a GPU only float32 is exact: the interpreter computes bfloat16 wrongly.
    names = given["dtype"].split(",") if "dtype" in given else ["float32"] if device.type == "cpu" else list(_DTYPES)
    if not set(names) <= set(_DTYPES):
        raise UserError(f"dtype={given['dtype']}: allowed are {', '.join(_DTYPES)}")
    seeds, shapes, workers = given.get("seeds", "1"), given.get("random", "0"), given.get("workers")
    for key, given_number in (("seeds", seeds), ("workers", workers)):
        if given_number is not None and (not given_number.isdecimal() or int(given_number) < 1):
            raise UserError(f"{key}={given_number}: give a whole number from 1 up")
    if not shapes.isdecimal():
        raise UserError(f"random={shapes}: give a whole number, of shapes")
    tasks = tuple(Task(op, implementation, _DTYPES[dtype]) for op, implementation in candidates for dtype in names)
    return Request(tasks, int(seeds), wanted is not None, int(shapes), int(workers) if workers is not None else None)


class _Rows:
    """The table, a row as soon as it and all before it are decided; a job that is killed has them in its log."""

    def __init__(self, console: Console, tasks: Sequence[Task]) -> None:
        self._console, self._tasks = console, tasks
        self._verdicts: dict[int, Verdict] = {}
        self._next = 0
        console.print(self._table(show_header=True))

    @property
    def decided(self) -> int:
        return len(self._verdicts)

    def failed(self, named: bool) -> bool:
        """Whether any was; of `named` ones each has to be available."""
        statuses = {verdict.status for verdict in self._verdicts.values()}
        return bool(statuses & {*_FAILED, *(["unavailable"] if named else [])})

    def add(self, place: int, verdict: Verdict) -> None:
        self._verdicts[place] = verdict
        while self._next in self._verdicts:
            self._print(self._next)
            self._next += 1

    def add_held(self) -> None:
        """Those that are decided although some before them are not."""
        for place in sorted(self._verdicts):
            if place > self._next:
                self._print(place)

    def _print(self, place: int) -> None:
        task, verdict = self._tasks[place], self._verdicts[place]
        colour = {"verified": "green", "unavailable": "dim"}.get(verdict.status, "bold red")
        row = self._table(show_header=False)
        row.add_row(
            task.op,
            task.name,
            task.dtype_name,
            Text(words(verdict.status), colour),
            number(verdict.relative_error, ".1e"),
            number(verdict.worst_ratio, ".2g"),
            Text(verdict.reason),
        )
        self._console.print(row)

    def _table(self, *, show_header: bool) -> Table:
        """An empty one, with the columns of every other."""
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_header=show_header)
        for header, texts in (
            ("op", [task.op for task in self._tasks]),
            ("implementation", [task.name for task in self._tasks]),
            ("dtype", [task.dtype_name for task in self._tasks]),
            ("verdict", ["unavailable", *map(words, _FAILED)]),
        ):
            table.add_column(header, no_wrap=True, min_width=max(map(len, [header, *texts])))
        for header in ("relative\nerror", "error /\nallowed"):
            least = max(map(len, header.splitlines()))
            table.add_column(header, no_wrap=True, min_width=least, justify="right")
        table.add_column("why", overflow="fold", ratio=1)
        return table


def _told(what: str, under_way: Sequence[tuple[float, Task]]) -> str:
    if not under_way:
        return ""
    (seconds, task), *others = under_way
    return f"; {what}: {task}, for {seconds:.0f} s{f', and {len(others)} more' if others else ''}"
