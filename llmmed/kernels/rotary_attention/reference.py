"""The truth for `rotary_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from llmmed.kernels.attention import reference as attention
from llmmed.kernels.rotary import reference as rotary


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> Tensor:
    """Causal attention of queries and keys that are rotated by their position: `rotary`, then `attention`.

    Computed in the wider of float32 and the inputs' dtypes, rounded once, at the end.

    Args:
        qkv: [batch, seq, n_heads + 2 n_kv_heads, head_dim], any float dtype: the heads of the queries, then those of
            the keys, then those of the values. head_dim is even, and n_kv_heads divides n_heads.
        cos, sin: [seq, head_dim / 2], float32.
        n_heads: Of the queries.

    Returns:
        [batch, seq, n_heads, head_dim] in qkv's dtype.
    """
    wide = torch.promote_types(torch.promote_types(qkv.dtype, cos.dtype), torch.float32)
    n_kv_heads = (qkv.size(2) - n_heads) // 2
    q, k, v = qkv.to(wide).split((n_heads, n_kv_heads, n_kv_heads), dim=2)
    q, k = rotary.rotary(q, k, cos, sin)
    return attention.attention(q, k, v).to(qkv.dtype)
