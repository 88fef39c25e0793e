"""The truth for `linear_cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor

from llmmed.kernels.cross_entropy import reference


def linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None
) -> Tensor:
    """The cross-entropy of hidden_states @ weight^T: mean over the rows that count, times `scale`, in nats.

    Ignored rows, the mean and `scale` are those of `cross_entropy`. Computed in the wider of float32 and the inputs'
    dtypes. An implementation may round the weight and the logits to the hidden states' dtype; it sums the weight's
    gradient over all rows in float32 and returns it in the weight's dtype.

    Args:
        hidden_states: [rows, width], any float dtype.
        weight: [vocab, width], any float dtype: the float32 parameter itself, not a copy in the compute dtype.
        targets: [rows] int64, each `ignore_index` or in [0, vocab).
        ignore_index: The target of a row that does not count.
        scale: 0-d float32, a constant factor of the loss.

    Returns:
        The loss, 0-d, in the dtype it was computed in.
    """
    wide = torch.promote_types(torch.promote_types(hidden_states.dtype, weight.dtype), torch.float32)
    return reference.cross_entropy(hidden_states.to(wide) @ weight.to(wide).mT, targets, ignore_index, scale)
