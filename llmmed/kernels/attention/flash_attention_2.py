"""`attention` by the FlashAttention 2 package (Dao 2023): an optional peer, newer than the copy inside PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.attention._backends import require_capability
from llmmed.kernels.base import Implementation, Unavailable

_OLDEST = (2, 8)  # before, its operators were declared to change their inputs, or were opaque to a compiler


def _load() -> Callable[..., Any]:
    try:
        import flash_attn
        from flash_attn import flash_attn_func
    except ImportError as error:
        reason = f"FlashAttention 2 is not installed ({error}); pip install flash-attn --no-build-isolation"
        raise Unavailable(reason) from error
    version = str(getattr(flash_attn, "__version__", ""))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise Unavailable(f"flash_attn {version or 'of unknown version'} is too old: {wanted} or newer is needed")
    require_capability(8, 0)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `reference.attention`. Its layout and its order of grouped heads are this project's."""
        out: Tensor = flash_attn_func(q, k, v, causal=True)
        return out

    return attention


IMPL = Implementation(
    "flash_attention_2",
    load=_load,
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    deterministic=False,  # its backward adds the queries' gradient with atomics
    kernel_names=("flash::flash_fwd", "flash::flash_bwd"),  # PyTorch's copy says pytorch_flash::
)
