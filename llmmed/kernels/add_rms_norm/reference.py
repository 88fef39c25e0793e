"""The truth for `add_rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + residual, and s / sqrt(mean(s^2) + eps) * weight over the last dimension.

    The pre-norm residual stream of Llama (RMSNorm: Zhang and Sennrich 2019). The sum is rounded to x's dtype first, and
    what is normalised is the rounded sum: the stream that the next layer reads. The norm is computed in the wider of
    float32 and the inputs' dtypes and rounded once, at the end.

    Args:
        x: A branch's output, [..., d_model], any float dtype.
        residual: The residual stream before it, as x.
        weight: [d_model], any float dtype.
        eps: Keeps a row of zeros finite; inside the root, beside the mean.

    Returns:
        The normed sum and the sum, the new residual stream, each [..., d_model] in x's dtype.
    """
    new_residual = x + residual
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    total = new_residual.to(wide)
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * rstd * weight.to(wide)).to(x.dtype), new_residual
