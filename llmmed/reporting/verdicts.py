"""The verdicts of the gate as a table, for the author of a kernel."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from rich.table import Table
from rich.text import Text

from llmmed import consoles
from llmmed.autotune.verify import Verdict
from llmmed.errors import UserError
from llmmed.files import write_json
from llmmed.kernels.catalog import implementation_names, op_names
from llmmed.kernels.operator import INTERPRETED
from llmmed.processes import how_it_ended, started_process
from llmmed.reporting.verdict_worker import RESTART, device_of_verdicts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_POLL_SECONDS = 0.02
_FAILED = ("wrong", "no_backward", "crashed", "failed_to_compile", "out_of_memory", "timed_out")


@dataclass(frozen=True)
class Request:
    """What to verify. `named`: the user asked for these implementations, so one that is unavailable is a failure.
    `random`: at how many random shapes besides the cases."""

    candidates: tuple[tuple[str, str], ...]
    dtypes: tuple[torch.dtype, ...]
    seeds: int
    named: bool
    random: int = 0


def main(arguments: Sequence[str]) -> int:
    """Verifies, prints, and returns the exit code: 1 if anything is wrong or the arguments are."""
    console = consoles.output()
    device = device_of_verdicts()
    try:
        request = parse(arguments, device)
    except UserError as error:
        consoles.errors().print(f"error: {error}", markup=False)
        return 1
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for header in ("op", "implementation", "dtype", "verdict", "relative\nerror", "error /\nallowed"):
        table.add_column(header, no_wrap=True, justify="right" if header[:5] in ("relat", "error") else "left")
    table.add_column("why", overflow="fold", ratio=1)
    failed = False
    with console.status("verifying") as status:
        for op, name, dtype, verdict in verdicts(request, status.update):
            failed |= verdict.status in _FAILED or (request.named and verdict.status == "unavailable")
            colour = {"verified": "green", "unavailable": "dim"}.get(verdict.status, "bold red")
            table.add_row(
                op,
                name,
                _words(dtype),
                Text(verdict.status.replace("_", " "), colour),
                "" if verdict.relative_error is None else f"{verdict.relative_error:.1e}",
                "" if verdict.worst_ratio is None else f"{verdict.worst_ratio:.2g}",
                Text(verdict.reason),
            )
    console.print(table)
    if device.type == "cpu" and not INTERPRETED:
        console.print("\nThere is no GPU here; TRITON_INTERPRET=1 runs Triton kernels on the CPU, slowly, in float32.")
    return 1 if failed else 0


def parse(arguments: Sequence[str], device: torch.device) -> Request:
    """`op=a,b impl=c dtype=float32 seeds=3 random=100`. Raises `UserError`."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in ("op", "impl", "dtype", "seeds", "random") or not equals or not value:
            raise UserError(
                f"'{argument}': write op=..., impl=..., dtype=..., seeds=... or random=...; nothing verifies everything"
            )
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
    seeds, shapes = given.get("seeds", "1"), given.get("random", "0")
    if not seeds.isdigit() or int(seeds) < 1:
        raise UserError(f"seeds={seeds}: give a whole number from 1 up")
    if not shapes.isdigit():
        raise UserError(f"random={shapes}: give a whole number, of shapes")
    dtypes = tuple(_DTYPES[name] for name in names)
    return Request(tuple(candidates), dtypes, int(seeds), wanted is not None, int(shapes))


def verdicts(
    request: Request, told: Callable[[str], None] = lambda what: None
) -> Iterator[tuple[str, str, torch.dtype, Verdict]]:
    """The verdict of every candidate in every dtype, found in another process, which a candidate may end or damage."""
    left = [(op, name, dtype) for op, name in request.candidates for dtype in request.dtypes]
    while left:
        with tempfile.TemporaryDirectory(prefix="llmmed-verify-") as folder:
            job, answers = Path(folder) / "job.json", Path(folder) / "answers.jsonl"
            answers.touch()
            todo = [(op, name, _words(dtype)) for op, name, dtype in left]
            write_json(job, {"left": todo, "seeds": request.seeds, "random": request.random})
            with (
                started_process("llmmed.reporting.verdict_worker", [str(job), str(answers)], None) as process,
                answers.open("rb") as file,
            ):
                told(f"verifying {_named(*left[0])}")
                ends, before = False, len(left)
                while left and not ends:
                    ends = process.poll() is not None  # and what it wrote until then is read once more
                    for line in _whole_lines(file):
                        yield *left.pop(0), Verdict(**json.loads(line))
                        told(f"verifying {_named(*left[0])}" if left else "")
                    time.sleep(_POLL_SECONDS)
            if left and (process.returncode != RESTART or len(left) == before):
                reason = f"the process {how_it_ended(process.returncode)} while it was verified"
                yield *left.pop(0), Verdict("crashed", reason, None, None, 0)


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Those that have come since the last call."""
    position = file.tell()
    while (line := file.readline()).endswith(b"\n"):
        position = file.tell()
        yield line
    file.seek(position)


def _named(op: str, name: str, dtype: torch.dtype) -> str:
    return f"{op} {name} in {_words(dtype)}"


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
