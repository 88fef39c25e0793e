"""What the kernels for Hopper share, whose warps have tasks of their own: barriers, descriptors, registers.

Of a program's warps one asks for tiles, and two groups of four compute.
"""

# Annotations are arguments' kinds, for the compiler. So no `from __future__` here.
import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
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


def described(tensor: Tensor, *block: int) -> TensorDescriptor:
    """For copies of tiles of this shape by the hardware (TMA)."""
    layout = _layout(block, tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout)


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    if len(block) == 1:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=1)
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))
