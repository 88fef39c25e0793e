"""The truth for `rotary`."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their position (Su et al. 2021), in the half-split form of Llama.

    With a head's vector split into halves (x1, x2): (x1 cos - x2 sin, x2 cos + x1 sin). Computed in the wider of
    float32 and the inputs' dtypes, rounded once.

    Args:
        q: [batch, seq, n_heads, head_dim], any float dtype.
        k: [batch, seq, n_kv_heads, head_dim].
        cos, sin: [seq, head_dim / 2], float32.

    Returns:
        q and k rotated, in their own dtypes.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    x1, x2 = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(wide)[:, None, :], sin.to(wide)[:, None, :]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
