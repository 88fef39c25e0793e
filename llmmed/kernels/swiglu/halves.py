"""Splits a fused [gate | up] projection so that backward need not copy the gradients together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def halves(fused: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of the last dimension, as views.

    `fused.chunk(2, -1)` with another backward: where the two gradients already lie side by side in one tensor, as the
    Triton `swiglu` writes them, that tensor is the gradient; `chunk` would copy it. A compiler traces `chunk` itself.
    """
    if torch.compiler.is_compiling():
        first, second = fused.chunk(2, dim=-1)
    else:
        first, second = _Halves.apply(fused)
    return first, second


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor) -> tuple[Tensor, ...]:
        return fused.chunk(2, dim=-1)

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        width = first.shape[-1]
        side_by_side = (
            first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
            and second.storage_offset() == first.storage_offset() + width
            and first.shape == second.shape
            and first.stride() == second.stride()
            and first.stride(-1) == 1
            and all(stride >= 2 * width for stride in first.stride()[:-1])
        )
        if not side_by_side:
            return torch.cat((first, second), dim=-1)
        return first.as_strided((*first.shape[:-1], 2 * width), first.stride())
