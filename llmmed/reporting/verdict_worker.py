"""The process in which `scripts/verify.py` tries candidates: one may end it, or leave the GPU in error."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from llmmed.autotune.failures import one_line
from llmmed.autotune.gpu_state import damage_of
from llmmed.autotune.process_settings import take_many_shapes
from llmmed.autotune.verify import Verdict, forget, verify
from llmmed.files import write_json
from llmmed.kernels.base import Implementation, Op, Unavailable
from llmmed.kernels.catalog import get_implementation, get_op, load_function
from llmmed.kernels.operator import INTERPRETED
from llmmed.processes import end_with_parent

_CHANCE = 8.0  # times what is allowed; planted mistakes are thousands of times off in float32
_SHAPES_WRITTEN_ANEW = 3  # of what a compiler writes for each shape, seconds every time


def main() -> None:
    """Answers each task that the parent writes, until that ends this process, or the GPU is in error. `sys.argv` has
    the file of the answer, the number of seeds and that of random shapes."""
    tasks: SimpleQueue[bytes] = SimpleQueue()
    end_with_parent(tasks.put)
    answer, seeds, shapes, device = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), device_of_verdicts()
    damage = None
    while damage is None:
        op, name, dtype = json.loads(tasks.get())
        verdict = _verdict(op, name, getattr(torch, dtype), device, seeds, shapes)
        damage = damage_of(device)
        if damage is not None and verdict.status in ("verified", "wrong", "no_backward"):
            verdict = Verdict("crashed", f"left the GPU in error: {damage}", None, None, 0)
        forget()  # what goes wrong here is still this candidate's
        write_json(answer, {"verdict": asdict(verdict), "is_last": damage is not None})


def device_of_verdicts() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def _verdict(op_name: str, name: str, dtype: torch.dtype, device: torch.device, seeds: int, shapes: int) -> Verdict:
    """Of several seeds, and then of random shapes: the first that is not `verified`, with the largest errors so far."""
    try:
        op = get_op(op_name)
        implementation = get_implementation(op_name, name)
        reason = implementation.why_not(device, dtype)
        if reason is not None:
            return _unavailable(reason)
        function = load_function(op_name, implementation)
        if "torch._dynamo" in sys.modules:  # whose import takes a second
            take_many_shapes()
    except Unavailable as error:
        return _unavailable(str(error))
    except Exception as error:  # noqa: BLE001 - a kernel under construction may raise anything
        return Verdict("crashed", f"raised while it was loaded: {one_line(error)}", None, None, 0)
    found = Verdict("verified", "", 0.0, 0.0, 0)
    at_cases = (verify(op, implementation, function, [], device, seed=seed, dtype=dtype) for seed in range(seeds))
    for verdict in chain(at_cases, at_random(op, implementation, function, dtype, device, shapes)):
        found = _with_errors_of(found, verdict)
        if found.status != "verified":
            break
    return found


def at_random(
    op: Op, implementation: Implementation, function: Callable[..., Any], dtype: torch.dtype, device: torch.device,
    shapes: int,
) -> Iterator[Verdict]:  # fmt: skip
    """At so many random shapes, the same every time, where the op has any. In float32, where in a call of few values
    chance decides, what is allowed counts a few times."""
    if op.draw is None:
        return
    dice = random.Random(0)
    for number in range(min(shapes, _SHAPES_WRITTEN_ANEW) if implementation.per_shape else shapes):
        call = op.draw(dice, dtype)
        verdict = verify(
            op, implementation, function, [call], device, seed=number, cases=(), to_the_end=True, whose="a random"
        )
        forget()
        by_chance = dtype == torch.float32 and (verdict.worst_ratio or math.inf) <= _CHANCE
        yield replace(verdict, status="verified", reason="") if verdict.status == "wrong" and by_chance else verdict


def _with_errors_of(earlier: Verdict, verdict: Verdict) -> Verdict:
    """The verdict, with the larger errors of both: where the largest is, is seldom where most of what is allowed is."""
    if verdict.relative_error is None or verdict.worst_ratio is None:
        return verdict
    return replace(
        verdict,
        relative_error=max(earlier.relative_error or 0.0, verdict.relative_error),
        worst_ratio=max(earlier.worst_ratio or 0.0, verdict.worst_ratio),
        checks=earlier.checks + verdict.checks,
    )


def _unavailable(reason: str) -> Verdict:
    return Verdict("unavailable", reason, None, None, 0)
