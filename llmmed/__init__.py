"""llmmed trains language models and picks, for every operation, the kernel that is proved right and measured fastest.

Nothing heavy is imported here: `import llmmed` costs milliseconds, so that a configuration error is told at once. The
functions below come with torch, when they are first asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmmed.benchmark.manual import (
        auto_select_kernels,
        benchmark_add_rms_norm,
        benchmark_attention,
        benchmark_cross_entropy,
        benchmark_linear_cross_entropy,
        benchmark_newton_schulz,
        benchmark_rms_norm,
        benchmark_rotary,
        benchmark_rotary_attention,
        benchmark_swiglu,
        benchmark_swiglu_mlp,
        manual_kernel_benchmark,
    )

# As nvidia-smi and NVML number GPUs, which say what is measured on. CUDA's own order puts the fastest first.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

__version__ = "0.1.0"
__all__ = [
    "auto_select_kernels",
    "benchmark_add_rms_norm",
    "benchmark_attention",
    "benchmark_cross_entropy",
    "benchmark_linear_cross_entropy",
    "benchmark_newton_schulz",
    "benchmark_rms_norm",
    "benchmark_rotary",
    "benchmark_rotary_attention",
    "benchmark_swiglu",
    "benchmark_swiglu_mlp",
    "manual_kernel_benchmark",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("llmmed.benchmark.manual"), name)
    raise AttributeError(f"module 'llmmed' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
