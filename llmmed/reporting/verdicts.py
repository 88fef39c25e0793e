"""The verdicts of the gate as a table, for the author of a kernel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
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
_KEYS = ("op", "impl", "dtype", "seeds", "random", "workers", "seconds")
_SECONDS, _SECONDS_A_SHAPE = 600, 20  # that a verdict may take, if nobody says otherwise
_POLL_SECONDS = 0.005
_FAILED = ("wrong", "no_backward", "crashed", "failed_to_compile", "out_of_memory", "timed_out")
_ROOM = 40  # columns, in which a reason can be read beside its row
_INDENT = 4  # of a reason below its row
_NAMED = 3  # at most, of the failures of a kind


@dataclass(frozen=True)
class Request:
    """What to verify. `named`: the user asked for these implementations, so one that is unavailable is a failure.
    `random`: at how many random shapes besides the cases. `workers`: in how many processes, if the user said so.
    `seconds`: how long each may take."""

    tasks: tuple[Task, ...]
    seeds: int
    named: bool
    random: int = 0
    workers: int | None = None
    seconds: float = _SECONDS


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
        started = VerdictPool.started(
            request.tasks, request.workers, request.seeds, request.random, request.seconds, device
        )
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
    console.print(f"\n{rows.summary(request.named)}", markup=False, soft_wrap=True)
    return 1 if rows.failed(request.named) else 0


def parse(arguments: Sequence[str], device: torch.device) -> Request:
    """`op=a,b impl=c dtype=float32 seeds=3 random=100 workers=4 seconds=600`. Raises `UserError`."""
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
    for key, given_number in (("seeds", seeds), ("workers", workers), ("seconds", given.get("seconds"))):
        if given_number is not None and (not given_number.isdecimal() or int(given_number) < 1):
            raise UserError(f"{key}={given_number}: give a whole number from 1 up")
    if not shapes.isdecimal():
        raise UserError(f"random={shapes}: give a whole number, of shapes")
    tasks = tuple(Task(op, implementation, _DTYPES[dtype]) for op, implementation in candidates for dtype in names)
    seconds = float(given.get("seconds", int(seeds) * (_SECONDS + _SECONDS_A_SHAPE * int(shapes))))
    processes = int(workers) if workers is not None else None
    return Request(tasks, int(seeds), wanted is not None, int(shapes), processes, seconds)


class _Rows:
    """The table, a row as soon as it and all before it are decided; a job that is killed has them in its log. Where a
    terminal has no room for the reasons beside the rows, they stand below them, and rows are never cut."""

    def __init__(self, console: Console, tasks: Sequence[Task]) -> None:
        self._console, self._tasks = console, tasks
        self._verdicts: dict[int, Verdict] = {}
        self._next = 0
        columns = [
            ["op", *(task.op for task in tasks)],
            ["implementation", *(task.name for task in tasks)],
            ["dtype", *(task.dtype_name for task in tasks)],
            ["verdict", "verified"],  # longer ones have no numbers, and take their place
            ["error", "1.0e-07"],
            ["allowed", "1.2e-07"],
        ]
        self._widths = [max(map(len, texts)) for texts in columns]
        headers = ["op", "implementation", "dtype", "verdict", "error", "allowed", "why" if self._is_wide else ""]
        self._print_line(Text("relative error /".rjust(self._offset - 1), "bold"))
        self._print_line(Text(self._line(headers), "bold"))

    @property
    def decided(self) -> int:
        return len(self._verdicts)

    def failed(self, named: bool) -> bool:
        """Whether any was; of `named` ones each has to be available."""
        statuses = {verdict.status for verdict in self._verdicts.values()}
        return bool(statuses & set(_failures(named)))

    def summary(self, named: bool) -> str:
        """How many are verified and how many are not, in a line, with the names of those that failed."""
        found: dict[str, list[str]] = {}
        for place, verdict in sorted(self._verdicts.items()):
            found.setdefault(verdict.status, []).append(str(self._tasks[place]))
        parts = [f"{len(found['verified'])} verified" if "verified" in found else "none verified"]
        for status in (*_FAILED, "unavailable"):
            if status not in found:
                continue
            names = found[status]
            asked_for = "asked for and " if named and status == "unavailable" else ""
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            which = f" ({', '.join(names[:_NAMED])}{more})" if status in _failures(named) else ""
            parts.append(f"{len(names)} {asked_for}{words(status)}{which}")
        return ", ".join(parts)

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
        error, ratio = number(verdict.relative_error, ".1e"), number(verdict.worst_ratio, ".2g")
        is_wide = self._is_wide
        offset = self._offset if is_wide else _INDENT
        folded = Text(verdict.reason).wrap(self._console, max(self._console.width - offset, 1), overflow="fold")
        reason = [line.plain.rstrip() for line in folded if line]
        beside = reason.pop(0) if is_wide and reason else ""
        row = Text(self._line([task.op, task.name, task.dtype_name, words(verdict.status), error, ratio, beside]))
        begin = sum(self._widths[:3]) + 3
        row.stylize(colour, begin, begin + len(words(verdict.status)))
        for line in (row, *(Text(" " * offset + line) for line in reason)):
            self._print_line(line)

    @property
    def _offset(self) -> int:
        """Of the reasons that stand beside their rows."""
        return sum(self._widths) + len(self._widths)

    @property
    def _is_wide(self) -> bool:
        return self._console.width - self._offset >= _ROOM

    def _line(self, cells: Sequence[str]) -> str:
        """Of the seven columns, never cut. A verdict may reach into empty ones of the numbers."""
        *texts, error, ratio, reason = cells
        *names, error_width, ratio_width = self._widths
        left = " ".join(text.ljust(width) for text, width in zip(texts, names, strict=True))
        numbers = f"{error:>{error_width}} {ratio:>{ratio_width}}"
        line = f"{left} {numbers}" if numbers.strip() else left.ljust(self._offset - 1)
        return f"{line} {reason}".rstrip()

    def _print_line(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)


def _failures(named: bool) -> tuple[str, ...]:
    """What makes the exit code 1."""
    return (*_FAILED, *(["unavailable"] if named else []))


def _told(what: str, under_way: Sequence[tuple[float, Task]]) -> str:
    if not under_way:
        return ""
    (seconds, task), *others = under_way
    return f"; {what}: {task}, for {seconds:.0f} s{f', and {len(others)} more' if others else ''}"
