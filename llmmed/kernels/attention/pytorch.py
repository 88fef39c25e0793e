"""The default `attention`: `scaled_dot_product_attention`, whichever backend PyTorch picks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmmed.kernels.base import Implementation

_LENGTHS_OF_CUDNN, _LEAST_HEAD_OF_CUDNN = 64, 48  # multiples of the one, from the other up: as far as it is trusted


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference.attention`.

    On Hopper PyTorch picks cuDNN. With torch 2.11 on an H100 the gate found its gradients wrong or not finite at heads
    of 16 and 32 and at a length of 131, though only in processes that had run other shapes before; FlashAttention's
    were right. So at such shapes FlashAttention is taken.
    """
    grouped = q.size(2) != k.size(2)
    trusted = q.size(1) % _LENGTHS_OF_CUDNN == 0 and q.size(-1) >= _LEAST_HEAD_OF_CUDNN
    if q.is_cuda and not trusted and _flash_takes(q):
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
