"""The truth for `attention`."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim), keys up to the query's position) v, for every head (Vaswani et al. 2017).

    Query head h reads key and value head h // (n_heads / n_kv_heads) (Ainslie et al. 2023). Computed in the wider of
    float32 and the inputs' dtype, rounded once, at the end.

    Args:
        q: [batch, seq, n_heads, head_dim], any float dtype.
        k, v: [batch, seq, n_kv_heads, head_dim]; n_kv_heads divides n_heads.

    Returns:
        [batch, seq, n_heads, head_dim] in q's dtype.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.size(2) // k.size(2)
    queries = q.to(wide).transpose(1, 2)
    keys, values = (x.to(wide).transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    scores = queries @ keys.mT * q.size(-1) ** -0.5
    future = torch.ones(q.size(1), q.size(1), dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    out: Tensor = (weights @ values).transpose(1, 2).to(q.dtype)
    return out
