"""`swiglu` in Triton: one pass over memory each way, nothing kept but the inputs.

Rows may be strided, so the two halves of a fused projection are read where they lie. The gradient of one is written as
one tensor, which the product before it takes as it is; two tensors would have to be copied together first.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.operator import TRITON_DEVICES, as_rows, make_operator, require_triton
from llmmed.kernels.tunable import Tunable

_TILE = 2048  # elements a program computes: 16 a thread with four warps


@triton.jit
def _tile(n_rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows, columns and mask of this program's tile; neighbours in the grid are neighbours in a row."""
    COL_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rows = tl.program_id(0) // COL_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % COL_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < N)[None, :]
    return rows.to(tl.int64)[:, None], cols[None, :], mask


@triton.jit
def swiglu_triton_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, n_rows,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows, cols, mask = _tile(n_rows, N, BLOCK_M, BLOCK_N)
    gate = tl.load(gate_ptr + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + rows * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_triton_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_stride, gate_stride, up_stride, n_rows,
    N: tl.constexpr, GRADIENT_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows, cols, mask = _tile(n_rows, N, BLOCK_M, BLOCK_N)
    dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dy * up * (sigmoid + silu * (1.0 - sigmoid))
    dup = dy * silu
    out = rows * GRADIENT_STRIDE + cols
    tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + out, dup.to(dup_ptr.dtype.element_ty), mask=mask)


class Launch(NamedTuple):
    """The sides of a program's tile, and its warps."""

    block_m: int
    block_n: int
    num_warps: int


def default_launch(device: torch.device, width: int, itemsize: int) -> Launch:
    """Blocks of columns shrink as long as that masks fewer of them."""
    block_n = min(1024, triton.next_power_of_2(width))
    while block_n > 256 and -width % (block_n // 2) < -width % block_n:
        block_n //= 2
    return Launch(max(1, _TILE // block_n), block_n, 4)


def _alternatives(device: torch.device, width: int, itemsize: int) -> Iterator[Launch]:
    """Half and twice the elements a thread, in tiles of as many columns."""
    block_m, block_n, num_warps = default_launch(device, width, itemsize)
    yield Launch(block_m, block_n, 2 * num_warps)
    yield Launch(2 * block_m, block_n, 2 * num_warps)
    yield Launch(2 * block_m, block_n, num_warps)
    yield Launch(max(1, block_m // 2), block_n, num_warps)


def _programs(launch: Launch, n_rows: int, width: int) -> int:
    programs: int = triton.cdiv(n_rows, launch.block_m) * triton.cdiv(width, launch.block_n)
    return programs


_FORWARD = Tunable("swiglu_triton_fwd_kernel", default_launch, _alternatives)
_BACKWARD = Tunable("swiglu_triton_bwd_kernel", default_launch, _alternatives)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up, each [rows, d_ff] with unit stride in the last dimension."""
    gate_rows = as_rows(gate)
    if up is None:
        gate_half, up_half = gate_rows.split(gate_rows.shape[1] // 2, dim=1)
        return gate_half, up_half
    return gate_rows, as_rows(up)


def _output(gate: Tensor, up: Tensor | None) -> Tensor:
    width = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    return torch.empty((*gate.shape[:-1], width), dtype=gate.dtype, device=gate.device)


def _gradients(gate: Tensor, up: Tensor | None) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up) if x is not None]


def activate(gate: Tensor, up: Tensor | None = None, launched_by: Callable[..., Launch] = default_launch) -> Tensor:
    """`swiglu` without gradients."""
    y = _output(gate, up)
    gate_rows, up_rows = _halves(gate, up)
    n_rows, width = gate_rows.shape
    if n_rows:
        launch = launched_by(gate.device, width=width, itemsize=gate.element_size())
        swiglu_triton_fwd_kernel[(_programs(launch, n_rows, width),)](
            gate_rows, up_rows, y, gate_rows.stride(0), up_rows.stride(0), n_rows,
            N=width, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, num_warps=launch.num_warps,
        )  # fmt: skip
    return y


def _forward(gate: Tensor, up: Tensor | None) -> tuple[Tensor]:
    return (activate(gate, up, _FORWARD),)


def _fake_forward(gate: Tensor, up: Tensor | None) -> tuple[Tensor]:
    return (_output(gate, up),)


def _backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    gradients = _gradients(gate, up)
    dgate_rows, dup_rows = _halves(gradients[0], None if up is None else gradients[1])
    dy_rows, (gate_rows, up_rows) = as_rows(dy), _halves(gate, up)
    n_rows, width = gate_rows.shape
    if n_rows:
        launch = _BACKWARD(gate.device, width=width, itemsize=gate.element_size())
        swiglu_triton_bwd_kernel[(_programs(launch, n_rows, width),)](
            dy_rows, gate_rows, up_rows, dgate_rows, dup_rows,
            dy_rows.stride(0), gate_rows.stride(0), up_rows.stride(0), n_rows,
            N=width, GRADIENT_STRIDE=dgate_rows.stride(0),
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, num_warps=launch.num_warps,
        )  # fmt: skip
    return gradients


def _fake_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    return _gradients(gate, up)


_operator = make_operator(
    "llmmed::swiglu_triton",
    forward=_forward,
    fake_forward=_fake_forward,
    backward=_backward,
    fake_backward=_fake_backward,
    save=lambda arguments, results: arguments,
    gradients=("gate", "up"),
    spread=lambda dgate, dup=None: (dgate, dup),
)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `reference.swiglu`. Raises `ValueError` where gate and up have other shapes, or a fused width is odd."""
    if up is not None and gate.shape != up.shape:
        raise ValueError(f"swiglu (triton): gate is {tuple(gate.shape)} and up {tuple(up.shape)}; expand one of them")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"swiglu (triton): gate and up side by side have an even width, not {gate.shape[-1]}")
    result: Tensor = _operator(gate, up)
    return result


def _load() -> Callable[..., Any]:
    require_triton()
    return swiglu


IMPL = Implementation(
    "triton",
    load=_load,
    devices=TRITON_DEVICES,
    kernel_names=("swiglu_triton_fwd_kernel", "swiglu_triton_bwd_kernel"),
    tunable=(_FORWARD, _BACKWARD),
)
