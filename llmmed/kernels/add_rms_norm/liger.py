"""`add_rms_norm` by Liger: an optional peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation, Unavailable


def _load() -> Callable[..., Any]:
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    except ImportError as error:
        raise Unavailable(f"Liger is not installed or too old ({error}); pip install -U liger-kernel") from error
    if not torch.cuda.is_available():
        raise Unavailable("Liger's kernels need a CUDA GPU, and torch sees none")

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `reference.add_rms_norm`."""
        # `gemma` is Liger's name for float32 throughout; in place it would write over the gradient that arrives.
        normed, new_residual = LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "gemma", False)
        return normed, new_residual

    return add_rms_norm


IMPL = Implementation(
    "liger",
    load=_load,
    devices=("cuda",),
    compiles=False,  # Liger does not promise a graph without breaks
    kernel_names=("fused_add_rms_norm_forward_kernel", "fused_add_rms_norm_backward_kernel"),
)
