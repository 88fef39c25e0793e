"""The default `cross_entropy`: PyTorch's own, over float32 logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmmed.kernels.base import Implementation


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None) -> Tensor:
    """See `reference.cross_entropy`. PyTorch's own mean would be NaN where no row counts."""
    total = F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction="sum")
    loss = total / (targets != ignore_index).sum().clamp(min=1)
    return loss if scale is None else loss * scale


IMPL = Implementation("pytorch", load=lambda: cross_entropy)
