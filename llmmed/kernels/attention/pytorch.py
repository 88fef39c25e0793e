"""The default `attention`: `scaled_dot_product_attention`, whichever backend PyTorch picks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmmed.kernels.base import Implementation

_TILE_OF_CUDNN = 64  # positions and columns: of whole tiles it reads nothing but what is there


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference.attention`.

    On Hopper PyTorch picks cuDNN. With torch 2.11 on an H100 its gradients were not finite at heads of 16 and 32 and at
    a length of 131 where the memory beside or behind a tensor held NaN: it reads whole tiles. FlashAttention does not,
    and is taken wherever tiles are not whole.
    """
    grouped = q.size(2) != k.size(2)
    whole = q.size(1) % _TILE_OF_CUDNN == 0 and q.size(-1) % _TILE_OF_CUDNN == 0
    if q.is_cuda and not whole and _flash_takes(q):
        group = q.size(2) // k.size(2)
        if grouped:
            k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        states = (x.transpose(1, 2) for x in (q, k, v))
        flash: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*states, 0.0, True)[0]
        return flash.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _flash_takes(q: Tensor) -> bool:
    """Whether FlashAttention supports this dtype, head size and GPU."""
    suits = q.dtype in (torch.bfloat16, torch.float16) and q.size(-1) % 8 == 0 and q.size(-1) <= 256
    return suits and torch.cuda.get_device_capability(q.device) >= (8, 0)


IMPL = Implementation("pytorch", load=lambda: attention)
