"""`rms_norm` by Liger: an optional peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation, Unavailable


def _load() -> Callable[..., Any]:
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError as error:
        raise Unavailable(f"Liger is not installed ({error}); pip install liger-kernel") from error
    if not torch.cuda.is_available():
        raise Unavailable("Liger's kernels need a CUDA GPU, and torch sees none")

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `reference.rms_norm`."""
        # `gemma` is Liger's name for float32 throughout; in place it would write over the gradient that arrives.
        y: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)
        return y

    return rms_norm


IMPL = Implementation(
    "liger",
    load=_load,
    devices=("cuda",),
    compiles=False,  # Liger does not promise a graph without breaks
    kernel_names=("rms_norm_forward_kernel", "rms_norm_backward_kernel"),
)
