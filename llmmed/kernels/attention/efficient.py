"""`attention` through PyTorch's memory-efficient backend (CUTLASS)."""

from __future__ import annotations

import torch
from torch import Tensor

from llmmed.kernels.attention._backends import load_backend
from llmmed.kernels.base import Implementation


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)[0]
    return out


IMPL = Implementation(
    "efficient",
    load=lambda: load_backend(_efficient, needs_capability=(5, 0)),
    devices=("cuda",),
    deterministic=False,
    kernel_names=("fmha_cutlass",),
)
