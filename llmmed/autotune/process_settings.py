"""What the processes of tuning have in common: the settings under which they compile."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from llmmed.autotune.journal import Job
from llmmed.template import start_over_unless
from llmmed.training.execution import keep_triton_cache, take_deterministic_kernels

_SHAPES_PER_FUNCTION = 1024  # the gate alone tries dozens; PyTorch's limit of 8 is meant for a training step


def offer_to_out_of_memory_killer() -> None:
    """Where memory runs out on Linux, a candidate is to die and not the run."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def take_one_core() -> None:
    """Has this process compute and compile on one core, also where `OMP_NUM_THREADS` and
    `TORCHINDUCTOR_COMPILE_THREADS` come too late to say so, since it is the fork of one that has read them."""
    from torch._inductor import config

    torch.set_num_threads(1)
    # With torch 2.13 a setting counts in its own thread alone, and backward passes are compiled in others.
    config._config["compile_threads"].default = 1  # type: ignore[attr-defined]


def take_settings(job: Job) -> None:
    """What compiled kernels depend on, so that what one process compiles another finds. Makes the GPU's context."""
    if job.device == "cuda":
        start_over_unless(lambda: torch.zeros(1, device=job.device))
    take_many_shapes()
    torch.set_float32_matmul_precision(job.matmul_precision)
    if job.device == "cuda":
        keep_triton_cache()
    if job.deterministic:
        take_deterministic_kernels()


def take_many_shapes() -> None:
    """Has the compiler take as many shapes of a function as the gate tries in one process."""
    torch._dynamo.config.recompile_limit = _SHAPES_PER_FUNCTION
    torch._dynamo.config.accumulated_recompile_limit = _SHAPES_PER_FUNCTION
