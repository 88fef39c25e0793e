"""A product that `linear_cross_entropy` adds to another, with a sum in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left @ right, in float32 whatever the factors are; the first product overwrites what was there."""
    if total.is_meta:
        return  # nothing to compute, and torch 2.11 has no such operator for meta tensors
    beta = 0 if first else 1
    if left.dtype == torch.float32:
        torch.addmm(total, left, right, beta=beta, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=beta, out=total)
