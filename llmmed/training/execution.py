"""How the step runs: the backend's settings, and whether it is compiled."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from pathlib import Path

import torch

from llmmed.autotune.plan import Mode
from llmmed.config import Config
from llmmed.errors import UserError


def prepare_backend(config: Config) -> None:
    """Process-wide settings, in one place: TF32 for float32 products on a GPU, unless determinism is asked for."""
    exact = config.train.deterministic or config.device == "cpu"  # on a CPU "high" is emulated, and slow
    torch.set_float32_matmul_precision("highest" if exact else "high")
    if config.device == "cuda":
        keep_triton_cache()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        take_deterministic_kernels()


def keep_triton_cache() -> None:
    """Has Triton keep what it compiles where it always does.

    With torch 2.11 to 2.13 Inductor, once it has compiled something, points the whole process at a folder of its own.
    What other processes have compiled for it, or itself before, would not be found there.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton import knobs

    folder = Path(knobs.cache.dir)
    with contextlib.suppress(OSError):  # then Inductor's, which is in the folder for temporary files
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder))


def take_deterministic_kernels() -> None:
    """Has PyTorch take, in this process, kernels that give the same bits on every run.

    Of attention's backends these are FlashAttention and plain mathematics. With torch 2.11 on an H200 cuDNN's gradients
    were then not finite at some shapes, and those of the memory-efficient backend differed between two runs.
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def resolve_compile(config: Config) -> Mode:
    """`train.compile` resolved. Raises `UserError` if what is asked for cannot be had.

    `auto` takes CUDA graphs on a GPU: the same kernels as `compiled`, without waiting for the host; and `eager` on a
    CPU, where compiling takes longer than what it saves in a short run.
    """
    wanted = config.train.compile
    if wanted == "eager":
        return "eager"
    obstacle = _obstacle(config.device)
    if wanted == "graphs" and config.device != "cuda":
        obstacle = "CUDA graphs need a CUDA GPU"
    if wanted != "auto":
        if obstacle:
            raise UserError(f"train.compile={wanted}: {obstacle}; use train.compile=eager")
        return wanted
    return "graphs" if config.device == "cuda" and obstacle is None else "eager"


def _obstacle(device: str) -> str | None:
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs Triton on a GPU (pip install triton)"
        if not any(map(shutil.which, ("gcc", "clang", "cc"))):
            return "torch.compile and Triton need a C compiler (apt install gcc)"
        return None
    return None if any(map(shutil.which, ("g++", "clang++", "c++"))) else "torch.compile needs a C++ compiler"
