"""What the kernels for Hopper share, whose warps have tasks of their own: barriers, descriptors, registers.

Of a program's warps one asks for tiles, and two groups of four compute.
"""

# Annotations are arguments' kinds, for the compiler. So no `from __future__` here.
import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Four warps of the first group; twelve in all, for whose 168 registers a thread there is room, and which the compiler
# hands over from those that fetch to those that compute.
RESOURCES = {"num_warps": 4, "maxnreg": 168}


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """Of a ring of buffers. Each is passed once so many have arrived, then anew."""
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def add_step(
    acc, left_tiles, right_tiles, full, empty, step, later,
    ROWS: gl.constexpr, COLS: gl.constexpr, STAGES: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Begins a step of a product's sum, left right^T, and waits for the one before, unless it is the first: its buffer
    is free then. Of the left tile a group has ROWS rows, of the right one the first COLS."""
    slot = step % STAGES
    mbarrier.wait(full.index(slot), step // STAGES & 1)
    left = left_tiles.index(slot).slice(WHICH * ROWS, ROWS, dim=0)
    right = right_tiles.index(slot).slice(0, COLS, dim=0).permute((1, 0))
    acc = warpgroup_mma(left, right, acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=later)
    return acc


@gluon.jit
def end_sum(acc, empty, step, STAGES: gl.constexpr):
    """Waits for the last step of a sum, which came before `step`."""
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return acc


@gluon.jit
def send(part, desc, row, col, outgoing, PART: gl.constexpr):
    """Stores a part of a result by way of one of two buffers, once that is free. Neighbouring parts take turns: of what
    is on its way when one begins, all but the one right before has left."""
    buffer = outgoing.index(PART % 2)
    tma.store_wait(1)
    buffer.store(part)
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [row, col], buffer)


@gluon.jit
def rounded(acc, dtype: gl.constexpr):
    """Two at a time. Where the compiler is free to, it rounds what is stored late only then, and lets the next sum wait
    until it has."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [acc], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [acc], dtype=gl.float16, is_pure=True, pack=2
        )


def described(tensor: Tensor, *block: int, swizzle: int | None = None) -> TensorDescriptor:
    """For copies of tiles of this shape by the hardware (TMA), which swizzles so many bytes, or those of a row."""
    layout = _layout(block, tensor.dtype, swizzle)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout)


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype, swizzle: int | None) -> gl.NVMMASharedLayout:
    swizzle = 0 if len(block) == 1 else swizzle
    if swizzle is not None:
        return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * dtype.itemsize, rank=len(block))
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))
