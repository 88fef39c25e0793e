"""The default `linear_cross_entropy`: a matrix product, then whichever `cross_entropy` is chosen."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmmed.kernels.base import Implementation, Kernels


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    scale: Tensor | None = None,
    *,
    kernels: Kernels,
) -> Tensor:
    """See `reference.linear_cross_entropy`. The weight is rounded to the hidden states' dtype first."""
    logits = F.linear(hidden_states, weight.to(hidden_states.dtype))
    loss: Tensor = kernels.cross_entropy(logits, targets, ignore_index, scale)
    return loss


IMPL = Implementation("pytorch", load=lambda: linear_cross_entropy, uses=("cross_entropy",))
