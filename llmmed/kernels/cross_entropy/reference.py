"""The truth for `cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None) -> Tensor:
    """scale * mean over the rows that count of (log sum_j exp(logits_j) - logits_target), in nats.

    A row whose target is `ignore_index` does not count: it adds nothing to the mean, and its gradient is zero. Where no
    row counts, the loss and every gradient are zero, so that a batch of padding does not poison the weights. The
    gradient of a row that counts is scale * (softmax(logits) - one_hot(target)) / rows that count (Bridle 1990).

    Computed in the wider of float32 and the logits' dtype. The gradient is rounded to the logits' dtype once, after
    `scale` and the upstream gradient were applied: in float16 its entries underflow without a scale.

    Args:
        logits: [rows, vocab], any float dtype.
        targets: [rows] int64, each `ignore_index` or in [0, vocab).
        ignore_index: The target of a row that does not count. It may be a class: that class then never counts.
        scale: 0-d float32, a constant factor of the loss: the loss scale over the number of accumulation steps.

    Returns:
        The loss, 0-d, in the dtype it was computed in.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    counts = targets != ignore_index
    log_probabilities = logits.to(wide).log_softmax(-1)
    chosen = log_probabilities.gather(1, torch.where(counts, targets, 0).unsqueeze(1)).squeeze(1)
    loss = -torch.where(counts, chosen, 0.0).sum() / counts.sum().clamp(min=1)
    return loss if scale is None else loss * scale.to(wide)
