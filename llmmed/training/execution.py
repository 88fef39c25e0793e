"""How the step runs: the backend's settings, and whether it is compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from llmmed.autotune.plan import Mode
from llmmed.config import Config
from llmmed.errors import UserError


def prepare_backend(config: Config) -> None:
    """Process-wide settings, in one place: TF32 for float32 products on a GPU, unless determinism is asked for."""
    exact = config.train.deterministic or config.device == "cpu"  # on a CPU "high" is emulated, and slow
    torch.set_float32_matmul_precision("highest" if exact else "high")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def resolve_compile(config: Config) -> Mode:
    """`train.compile` resolved. Raises `UserError` if `compiled` is asked for and cannot be had."""
    wanted = config.train.compile
    if wanted == "eager":
        return "eager"
    obstacle = _obstacle(config.device)
    if wanted == "compiled":
        if obstacle:
            raise UserError(f"train.compile=compiled: {obstacle}; use train.compile=eager")
        return "compiled"
    return "compiled" if config.device == "cuda" and obstacle is None else "eager"


def _obstacle(device: str) -> str | None:
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs Triton on a GPU (pip install triton)"
        if not any(map(shutil.which, ("gcc", "clang", "cc"))):
            return "torch.compile and Triton need a C compiler (apt install gcc)"
        return None
    return None if any(map(shutil.which, ("g++", "clang++", "c++"))) else "torch.compile needs a C++ compiler"
