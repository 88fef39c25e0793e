"""`attention` through PyTorch's FlashAttention backend."""

from __future__ import annotations

import torch
from torch import Tensor

from llmmed.kernels.attention._backends import load_backend
from llmmed.kernels.base import Implementation


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return out


IMPL = Implementation(
    "flash",
    load=lambda: load_backend(_flash, needs_capability=(8, 0)),
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    deterministic=False,  # its backward adds the queries' gradient with atomics
    kernel_names=("flash_fwd", "flash_bwd"),
)
