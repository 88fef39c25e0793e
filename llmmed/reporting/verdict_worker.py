"""The process in which `scripts/verify.py` tries candidates: one may end it, or leave the GPU in error."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from llmmed.autotune.failures import one_line
from llmmed.autotune.gpu_state import damage_of
from llmmed.autotune.verify import Verdict, forget, verify
from llmmed.files import read_json
from llmmed.kernels.base import Unavailable
from llmmed.kernels.catalog import get_implementation, get_op, load_function
from llmmed.kernels.operator import INTERPRETED
from llmmed.processes import end_with_parent

RESTART = 17  # the exit code where the verdict is written, and the GPU of no use to those that are left


def main() -> None:
    """Works through the job, a verdict a line as soon as it is found. `sys.argv` has both files."""
    end_with_parent()
    job, device = read_json(Path(sys.argv[1])), device_of_verdicts()
    with Path(sys.argv[2]).open("a", encoding="utf-8") as answers:
        for op, name, dtype in job["left"]:
            verdict = _verdict(op, name, getattr(torch, dtype), device, job["seeds"])
            damage = damage_of(device)
            if damage is not None and verdict.status in ("verified", "wrong", "no_backward"):
                verdict = Verdict("crashed", f"left the GPU in error: {damage}", None, None, 0)
            answers.write(json.dumps(asdict(verdict)) + "\n")
            answers.flush()
            if damage is not None:
                os._exit(RESTART)
            forget()


def device_of_verdicts() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def _verdict(op_name: str, name: str, dtype: torch.dtype, device: torch.device, seeds: int) -> Verdict:
    """Of several seeds the first verdict that is not `verified`, or the worst."""
    try:
        op = get_op(op_name)
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
