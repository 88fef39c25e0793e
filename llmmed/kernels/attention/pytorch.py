"""The default `attention`: `scaled_dot_product_attention`, whichever backend PyTorch picks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmmed.kernels.base import Implementation


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference.attention`."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.size(2) != k.size(2)
    )
    return out.transpose(1, 2)


IMPL = Implementation("pytorch", load=lambda: attention)
