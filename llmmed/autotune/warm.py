"""Compiles what tuning will need, on all cores at once, before the one process that tries and times it.

Each warm-up process verifies a share of the candidates, on few rows, and throws the verdicts away: what stays is in the
compilers' caches on disk. Whatever goes wrong here goes wrong again where it is judged.

Run as `python -m llmmed.autotune.warm <job.json> <share> <of how many>` by `child.py`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from llmmed.autotune.journal import Job
from llmmed.autotune.verify import verify
from llmmed.kernels.base import Call, TensorSpec
from llmmed.kernels.catalog import DEFAULT, get_implementation, get_op, load_function

_ROWS = 32  # of the run's own calls: enough for the kernels that full size takes, and next to no memory


def main() -> None:
    job, share, shares = Job.read(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    device = torch.device(job.device)
    torch.set_float32_matmul_precision(job.matmul_precision)
    units = [(task, name) for task in job.tasks for name in task.verify if name != DEFAULT]
    for task, name in units[share::shares]:
        # A candidate may raise anything at all; it is judged elsewhere.
        with contextlib.suppress(Exception):
            op, implementation = get_op(task.op), get_implementation(task.op, name)
            function = load_function(task.op, implementation)
            verify(op, implementation, function, [few_rows(call) for call in task.counts()], device)
    os._exit(0)


def few_rows(call: Call) -> Call:
    """The call with the first dimension of what shares it cut down."""
    rows = next(iter(call.tensors.values())).shape[0]
    least = min(rows, _ROWS)
    return Call(
        call.op,
        tuple(
            (n, replace(v, shape=(least, *v.shape[1:])) if isinstance(v, TensorSpec) and v.shape[:1] == (rows,) else v)
            for n, v in call.arguments
        ),
    )


if __name__ == "__main__":
    main()
