"""`linear_cross_entropy` by PyTorch's own chunked function, where this PyTorch has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmmed.kernels.base import Implementation, Unavailable


def _load() -> Callable[..., Any]:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy; it came with torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()

    def linear_cross_entropy(
        hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None
    ) -> Tensor:
        """See `reference.linear_cross_entropy`."""
        total = F.linear_cross_entropy(
            hidden_states,
            weight.to(hidden_states.dtype),
            targets,
            reduction="sum",
            ignore_index=ignore_index,
            options=options,
        )
        loss = total.float() / (targets != ignore_index).sum().clamp(min=1)
        return loss if scale is None else loss * scale

    return linear_cross_entropy


IMPL = Implementation("torch_fused", load=_load, compiles=False)  # it leaves the graph
