"""`attention` through cuDNN's fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from llmmed.kernels.attention._backends import load_backend
from llmmed.kernels.base import Implementation


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[0]
    return out


IMPL = Implementation(
    "cudnn",
    load=lambda: load_backend(_cudnn, needs_capability=(8, 0)),
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    deterministic=False,
    kernel_names=("cudnn",),
)
