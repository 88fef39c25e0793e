"""`rotary` by Liger: an optional peer. It rotates in place, so it is given copies, which count in its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation, Unavailable


def _load() -> Callable[..., Any]:
    try:
        from liger_kernel.ops.rope import rope_backward, rope_forward
    except ImportError as error:
        raise Unavailable(f"Liger is not installed ({error}); pip install liger-kernel") from error
    if not torch.cuda.is_available():
        raise Unavailable("Liger's kernels need a CUDA GPU, and torch sees none")

    class Rotary(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            q, k, cos, sin = rope_forward(_own(q), _own(k), cos, sin)
            ctx.save_for_backward(cos, sin)
            return q.transpose(1, 2), k.transpose(1, 2)

        @staticmethod
        def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
            dq, dk = rope_backward(_own(dq), _own(dk), *ctx.saved_tensors)
            return dq.transpose(1, 2), dk.transpose(1, 2), None, None

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See `reference.rotary`."""
        # Liger takes the tables of both halves, [1, seq, head_dim], and reads the first.
        cos, sin = (torch.cat((table, table), dim=-1)[None] for table in (cos, sin))
        q_out, k_out = Rotary.apply(q, k, cos, sin)
        return q_out, k_out

    return rotary


def _own(states: Tensor) -> Tensor:
    """A copy that may be written to, in the shape that Liger asks for and the order in memory that it works in."""
    return states.clone(memory_format=torch.contiguous_format).transpose(1, 2)


IMPL = Implementation(
    "liger",
    load=_load,
    devices=("cuda",),
    compiles=False,  # Liger does not promise a graph without breaks
    kernel_names=("_triton_rope",),
)
