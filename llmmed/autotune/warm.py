"""Compiles what tuning will need, on all cores at once, before the one process that tries and times it.

Each warm-up process runs a share of the calls once, forward and backward, and throws the results away: what stays is in
the compilers' caches on disk. Nothing is judged here, since processes that share a GPU wait long for its answers.
Whatever goes wrong here goes wrong again where it is judged.

Run as `python -m llmmed.autotune.warm <job.json> <share> <of how many>` by `child.py`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmmed.autotune.journal import Job, Task
from llmmed.autotune.measure import compiled_alone
from llmmed.autotune.plan import Mode
from llmmed.autotune.verify import trials
from llmmed.kernels.base import Call, Op
from llmmed.kernels.catalog import DEFAULT, get_implementation, get_op, load_function


def main() -> None:
    job, share, shares = Job.read(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    device = torch.device(job.device)
    torch.set_float32_matmul_precision(job.matmul_precision)
    for index, (task, name, call, compiled) in enumerate(_units(job.tasks, job.mode, device)):
        if index % shares != share:
            continue
        # A candidate may raise anything at all; it is judged elsewhere.
        with contextlib.suppress(Exception):
            op, implementation = get_op(task.op), get_implementation(task.op, name)
            if call.compute_dtype in implementation.dtypes:
                function = load_function(task.op, implementation)
                run_once(
                    op, torch.compile(function, fullgraph=True, dynamic=False) if compiled else function, call, device
                )
    with contextlib.suppress(Exception):
        torch.cuda.synchronize(device)
    os._exit(0)


def _units(tasks: list[Task], mode: Mode, device: torch.device) -> Iterator[tuple[Task, str, Call, bool]]:
    """Every call that will be made of a candidate, and whether compiled: the longest to compile first."""
    for task in tasks:
        for name in [*task.verify, *task.verified] if task.measure else ():
            if compiled_alone(get_implementation(task.op, name), mode):
                for call in task.counts():
                    yield task, name, call, True
    for task in tasks:
        calls = {trial.call for trial in trials(get_op(task.op), list(task.counts()), None, device)}
        for name in task.verify:
            for call in sorted(calls, key=str) if name != DEFAULT else ():
                yield task, name, call, False
        for name in task.verified:
            for call in task.counts() if name != DEFAULT else ():
                yield task, name, call, False


def run_once(op: Op, function: Callable[..., Any], call: Call, device: torch.device) -> None:
    """One forward and backward pass over bland values."""
    generator = torch.Generator(device=device).manual_seed(0)
    inputs = op.make_inputs(call, op.regimes[0], generator, device)
    leaves = [inputs[n] for n, spec in call.tensors.items() if spec.requires_grad and n in op.differentiable]
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = function(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if leaves:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)


if __name__ == "__main__":
    main()
