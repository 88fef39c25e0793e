"""`attention` by FlashAttention 3 (Shah et al. 2024), which is built for Hopper: an optional peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation, Unavailable


def _load() -> Callable[..., Any]:
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError as error:
        raise Unavailable(
            f"FlashAttention 3 is not installed ({error}); build it in the folder hopper of Dao-AILab/flash-attention"
        ) from error
    if not hasattr(torch.ops.flash_attn_3, "_flash_attn_forward"):
        raise Unavailable("this build of FlashAttention 3 is opaque to a compiler and returns more than the output; "
                          "build a newer one")  # fmt: skip
    if not torch.cuda.is_available():
        raise Unavailable("needs a CUDA GPU, and torch sees none")
    if torch.cuda.get_device_capability()[0] != 9:
        raise Unavailable("needs a GPU of compute capability 9.0 (Hopper)")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `reference.attention`. Its layout and its order of grouped heads are this project's."""
        out: Tensor = flash_attn_func(q, k, v, causal=True)
        return out

    return attention


IMPL = Implementation(
    "flash_attention_3",
    load=_load,
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    deterministic=False,  # its backward adds the queries' gradient with atomics
    kernel_names=("flash::FlashAttnFwd", "flash::FlashAttnBwd"),
)
