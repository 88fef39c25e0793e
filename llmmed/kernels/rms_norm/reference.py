"""The truth for `rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang and Sennrich 2019, as in Llama).

    Epsilon stands inside the root, beside the mean. Everything is computed in the wider of float32 and the inputs'
    dtypes and rounded once, at the end.

    Args:
        x: [..., d_model], any float dtype.
        weight: [d_model], any float dtype.
        eps: Keeps a row of zeros finite.

    Returns:
        [..., d_model] in x's dtype.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    x_wide = x.to(wide)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * rstd * weight.to(wide)).to(x.dtype)
