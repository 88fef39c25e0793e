"""The verdicts of the gate as a table, for the author of a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text

from llmmed import consoles
from llmmed.autotune.failures import one_line
from llmmed.autotune.verify import Verdict, forget, verify
from llmmed.errors import UserError
from llmmed.kernels.base import Unavailable
from llmmed.kernels.catalog import get_implementation, get_op, implementation_names, load_function, op_names
from llmmed.kernels.operator import INTERPRETED

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FAILED = ("wrong", "no_backward", "crashed", "failed_to_compile", "out_of_memory", "timed_out")


@dataclass(frozen=True)
class Request:
    """What to verify. `named`: the user asked for these implementations, so one that is unavailable is a failure."""

    candidates: tuple[tuple[str, str], ...]
    dtypes: tuple[torch.dtype, ...]
    seeds: int
    named: bool


def main(arguments: Sequence[str]) -> int:
    """Verifies, prints, and returns the exit code: 1 if anything is wrong or the arguments are."""
    console = consoles.output()
    device = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
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
        for op, name, dtype, verdict in verdicts(request, device, status.update):
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
    """`op=a,b impl=c dtype=float32 seeds=3`. Raises `UserError`."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in ("op", "impl", "dtype", "seeds") or not equals or not value:
            raise UserError(
                f"'{argument}': write op=..., impl=..., dtype=... or seeds=...; nothing verifies everything"
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
    seeds = given.get("seeds", "1")
    if not seeds.isdigit() or int(seeds) < 1:
        raise UserError(f"seeds={seeds}: give a whole number from 1 up")
    return Request(tuple(candidates), tuple(_DTYPES[name] for name in names), int(seeds), wanted is not None)


def verdicts(
    request: Request, device: torch.device, told: object = None
) -> Iterator[tuple[str, str, torch.dtype, Verdict]]:
    """The verdict of every candidate in every dtype: of several seeds the first that is not `verified`, or the last."""
    for op_name, name in request.candidates:
        for dtype in request.dtypes:
            if callable(told):
                told(f"verifying {op_name} {name} in {_words(dtype)}")
            yield op_name, name, dtype, _verdict(op_name, name, dtype, device, request.seeds)
        forget()


def _verdict(op_name: str, name: str, dtype: torch.dtype, device: torch.device, seeds: int) -> Verdict:
    op = get_op(op_name)
    try:
        implementation = get_implementation(op_name, name)
        reason = implementation.why_not(device, dtype)
        if reason is not None:
            return _unavailable(reason)
        function = load_function(op_name, implementation)
    except Unavailable as error:
        return _unavailable(str(error))
    except Exception as error:  # noqa: BLE001 - a kernel under construction may raise anything
        return Verdict("crashed", f"raised while it was loaded: {one_line(error)}", None, None, 0)
    worst = Verdict("verified", "", 0.0, 0.0, 0)
    for seed in range(seeds):
        verdict = verify(op, implementation, function, [], device, seed=seed, dtype=dtype)
        if verdict.status != "verified":
            return verdict
        worst = max(worst, verdict, key=lambda v: v.worst_ratio or 0.0)
    return worst


def _unavailable(reason: str) -> Verdict:
    return Verdict("unavailable", reason, None, None, 0)


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
