"""`attention` through PyTorch's flex attention: a causal mask by blocks, for which the compiler writes the kernels."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llmmed.kernels.attention._backends import require_capability
from llmmed.kernels.base import Implementation, Unavailable


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference.attention`. In a compiled step, whose graphs, of a layer each, take the mask as an input."""
    mask = _constant_mask(q.size(1), q.device)
    # Put together anew: a compiler cannot ask a constant object for everything that it wants to know of a mask.
    again = BlockMask(
        seq_lengths=(q.size(1), q.size(1)),
        kv_num_blocks=mask.kv_num_blocks,
        kv_indices=mask.kv_indices,
        full_kv_num_blocks=mask.full_kv_num_blocks,
        full_kv_indices=mask.full_kv_indices,
        q_num_blocks=mask.q_num_blocks,
        q_indices=mask.q_indices,
        full_q_num_blocks=mask.full_q_num_blocks,
        full_q_indices=mask.full_q_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=_causal,
    )
    return _attend(q, k, v, again)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    out: Tensor = flex_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        enable_gqa=q.size(2) != k.size(2),
        # Short sequences would get kernels of their own, written for decoding: what is verified there is to be what
        # long ones run.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=32)
def _causal_mask(seq: int, device: torch.device) -> BlockMask:
    return create_block_mask(_causal, None, None, seq, seq, device=device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_mask(seq: int, device: torch.device) -> BlockMask:
    """What a compiler calls while it traces, and takes for a constant."""
    return _causal_mask(seq, device)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _load() -> Callable[..., Any]:
    require_capability(8, 0)
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("flex attention is compiled to Triton, which is not installed; pip install triton")
    compiled = torch.compile(_attend, fullgraph=True, dynamic=False)

    def either(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `reference.attention`. In eager mode it is compiled by itself."""
        if torch.compiler.is_compiling():
            return attention(q, k, v)
        return compiled(q, k, v, _causal_mask(q.size(1), q.device))

    return either


IMPL = Implementation(
    "flex",
    load=_load,
    devices=("cuda",),
    per_shape=True,
    # Of the compiler's kernels only those written from a template are called so, and by default only these are.
    kernel_names=("triton_tem_fused",),
)
