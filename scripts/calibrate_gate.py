"""Shows how far the gate's limits lie from what it must accept and from what it must reject.

    python scripts/calibrate_gate.py                          every op; on a GPU in float32, bfloat16 and float16
    TRITON_INTERPRET=1 python scripts/calibrate_gate.py op=rms_norm,rotary seeds=3      without a GPU, in float32

Every implementation of the project is judged with values from several seeds, and every bug of `tests/kernels/bugs`. The
numbers are errors over what is allowed: those of right kernels must stay below 1, those of bugs above. The constants
of `llmmed/autotune/judge.py` lie between the two. The exit code is 1 if a right kernel is rejected or a bug accepted.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `tests`

from llmmed import consoles
from llmmed.autotune.verify import Verdict, verify
from llmmed.consoles import answered_help
from llmmed.errors import UserError
from llmmed.kernels.base import Unavailable
from llmmed.kernels.catalog import DEFAULT, get_implementation, get_op, implementation_names, load_function
from llmmed.kernels.operator import INTERPRETED
from tests.kernels.planted import bugs, mutant, ops_with_triton

_SEEDS = 20
_OURS = (DEFAULT, "triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Row:
    """A right kernel or a bug, and what the gate thinks of it."""

    op: str
    dtype: torch.dtype
    name: str
    right: bool
    verdict: Verdict

    @property
    def as_it_should_be(self) -> bool:
        return self.right == (self.verdict.status == "verified")


def main(arguments: list[str]) -> int:
    """Judges and prints; returns the exit code."""
    console = consoles.output()
    try:
        ops, seeds = _parse(arguments)
        device = _device()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    dtypes = _DTYPES if device.type == "cuda" else _DTYPES[:1]
    rows = []
    with console.status("calibrating") as status:
        for op in ops:
            for dtype in dtypes:
                for row in _judged(op, dtype, device, seeds):
                    rows.append(row)
                    status.update(f"{op} {_short(dtype)}: {row.name}")
    _print(rows, console)
    return 0 if rows and all(row.as_it_should_be for row in rows) else 1


def _parse(arguments: list[str]) -> tuple[list[str], int]:
    ops, seeds = ops_with_triton(), _SEEDS
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "op":
            unknown = set(value.split(",")) - set(ops)
            if unknown:
                raise UserError(f"op={value}: no Triton kernel for {', '.join(unknown)}; there are {', '.join(ops)}")
            ops = value.split(",")
        elif key == "seeds" and value.isdigit() and int(value):
            seeds = int(value)
        else:
            raise UserError(f"'{argument}': write op=... or seeds=...")
    return ops, seeds


def _device() -> torch.device:
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    raise UserError("there is no GPU here; TRITON_INTERPRET=1 runs Triton kernels on the CPU, slowly, in float32")


def _judged(op: str, dtype: torch.dtype, device: torch.device, seeds: int) -> Iterator[Row]:
    for name in implementation_names(op):
        if not name.startswith(_OURS):
            continue
        implementation = get_implementation(op, name)
        try:
            function = load_function(op, implementation)
        except Unavailable as reason:
            print(f"left out: {op} {name}, {reason}", file=sys.stderr)
            continue
        verdicts = [
            verify(get_op(op), implementation, function, [], device, seed=seed, dtype=dtype, to_the_end=True)
            for seed in range(seeds)
        ]
        yield Row(op, dtype, name, True, max(verdicts, key=_ratio))
    with tempfile.TemporaryDirectory(prefix="llmmed-mutants-") as folder:
        for bug in bugs(op):
            implementation, function = mutant(op, bug, Path(folder))
            verdict = verify(get_op(op), implementation, function, [], device, dtype=dtype, to_the_end=True)
            yield Row(op, dtype, bug, False, verdict)


def _ratio(verdict: Verdict) -> float:
    """An error over what is allowed; a kernel that is rejected for something else is infinitely far."""
    return float("inf") if verdict.worst_ratio is None else verdict.worst_ratio


def _print(rows: list[Row], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for header in ("op", "dtype", "right: worst", "of", "bugs: smallest", "of", "bugs rejected"):
        table.add_column(header, justify="right" if ":" in header else "left")
    for op, dtype in dict.fromkeys((row.op, row.dtype) for row in rows):
        here = [row for row in rows if (row.op, row.dtype) == (op, dtype)]
        planted = [row for row in here if not row.right]
        right = max((row for row in here if row.right), key=lambda row: _ratio(row.verdict))  # the default at least
        nearest = min(planted, key=lambda row: _ratio(row.verdict), default=None)
        rejected = sum(row.as_it_should_be for row in planted)
        table.add_row(
            op,
            _short(dtype),
            f"{_ratio(right.verdict):.2g}",
            right.name,
            f"{_ratio(nearest.verdict):.3g}" if nearest else "",
            nearest.name if nearest else "",
            f"{rejected} of {len(planted)}",
        )
    console.print(table)
    for row in rows:
        if not row.as_it_should_be:
            kind = "rejected" if row.right else "accepted"
            said = row.verdict.reason or f"error / allowed {_ratio(row.verdict):.2g}"
            console.print(Text(f"{kind}: {row.op} {_short(row.dtype)} {row.name}: {said}", "red"))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(0 if answered_help(__doc__) else main(sys.argv[1:]))
