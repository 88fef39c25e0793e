"""The default `rotary_attention`: whatever `rotary` and `attention` the table holds, one after the other."""

from __future__ import annotations

from torch import Tensor

from llmmed.kernels.base import Implementation, Kernels


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, *, kernels: Kernels) -> Tensor:
    """See `reference.rotary_attention`."""
    n_kv_heads = (qkv.size(2) - n_heads) // 2
    q, k, v = qkv.split((n_heads, n_kv_heads, n_kv_heads), dim=2)  # views
    q, k = kernels.rotary(q, k, cos, sin)
    out: Tensor = kernels.attention(q, k, v)
    return out


IMPL = Implementation("pytorch", load=lambda: rotary_attention, uses=("rotary", "attention"))
