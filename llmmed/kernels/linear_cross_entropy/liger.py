"""`linear_cross_entropy` by Liger: an optional peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation, Unavailable


def _load() -> Callable[..., Any]:
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise Unavailable(f"Liger is not installed ({error}); pip install liger-kernel") from error
    if not torch.cuda.is_available():
        raise Unavailable("Liger's kernels need a CUDA GPU, and torch sees none")

    def linear_cross_entropy(
        hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None
    ) -> Tensor:
        """See `reference.linear_cross_entropy`. The weight's gradient is summed in float32."""
        bias = class_weights = softcap = None
        loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
            hidden_states, weight.to(hidden_states.dtype), targets, bias, class_weights, ignore_index,
            0.0, 0.0, "mean", softcap, False, torch.float32,
        )[0]  # fmt: skip
        return loss if scale is None else loss * scale

    return linear_cross_entropy


IMPL = Implementation(
    "liger",
    load=_load,
    devices=("cuda",),
    compiles=False,  # it reads the number of targets back to the host
    kernel_names=("liger_cross_entropy_kernel",),
)
