"""`rms_norm` in Triton: one pass over memory forward, one backward.

Backward runs a fixed number of programs, each over many rows. The weight's gradient is summed in registers, one partial
row a program, and the partial rows are added up in a fixed order: deterministic, float32 throughout.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.operator import TRITON_DEVICES, as_rows, make_operator, require_triton, shared_bytes, sm_count
from llmmed.kernels.tunable import Tunable

_MAX_WIDTH = 16384  # a row must fit into one program's registers
_SCRATCH_BYTES = 1024  # of shared memory, for sums across warps


@triton.jit
def rms_norm_triton_fwd_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, x_stride, n_rows,
    N: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_mask = rows < n_rows
    mask = row_mask[:, None] & (cols < N)[None, :]
    rows64 = rows.to(tl.int64)
    x = tl.load(x_ptr + rows64[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + EPS)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + rows64[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows64, rstd, mask=row_mask)


@triton.jit
def rms_norm_triton_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, dy_stride, x_stride, n_rows,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < N
    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    # Two-dimensional, so that rows are added up across threads once, after the loop.
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < n_rows
        mask = row_mask[:, None] & col_mask[None, :]
        rows64 = rows.to(tl.int64)
        dy = tl.load(dy_ptr + rows64[:, None] * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows64[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows64, mask=row_mask, other=0.0)
        x_hat = x * rstd[:, None]
        scaled = dy * weight[None, :]
        dweight += dy * x_hat
        projection = tl.sum(scaled * x_hat, axis=1) / N
        dx = (scaled - x_hat * projection[:, None]) * rstd[:, None]
        tl.store(dx_ptr + rows64[:, None] * N + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * N + cols, tl.sum(dweight, axis=0), mask=col_mask)


@triton.jit
def norm_weight_gradient_kernel(
    partial_ptr, gradient_ptr, n_partials, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, n_partials, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < n_partials)[:, None] & (cols < N)[None, :]
        total += tl.load(partial_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(gradient_ptr + cols, tl.sum(total, axis=0).to(gradient_ptr.dtype.element_ty), mask=cols < N)


class Forward(NamedTuple):
    """Rows a program normalises, and its warps."""

    block_m: int
    num_warps: int


class Backward(NamedTuple):
    """Rows a program takes at a time, its warps, programs per multiprocessor, and stages of their pipeline."""

    block_m: int
    num_warps: int
    per_sm: int
    stages: int


def forward_launch(device: torch.device, width: int, itemsize: int) -> Forward:
    """Tiles of about 4,096 elements and at least a row, 32 a thread."""
    block_n = triton.next_power_of_2(width)
    block_m = max(1, 4096 // block_n)
    return Forward(block_m, max(4, min(16, block_m * block_n // 1024)))


def forward_alternatives(device: torch.device, width: int, itemsize: int) -> Iterator[Forward]:
    """Tiles of half and twice the size, and other numbers of warps, with up to 32 elements a thread."""
    block_m, num_warps = forward_launch(device, width, itemsize)
    yield Forward(max(1, block_m // 2), num_warps)
    yield Forward(max(1, block_m // 2), max(2, num_warps // 2))
    yield Forward(block_m, min(16, 2 * num_warps))
    if 2 * block_m * triton.next_power_of_2(width) <= 32768 // itemsize:
        yield Forward(2 * block_m, min(16, 2 * num_warps))


def _backward_launch(device: torch.device, width: int, itemsize: int) -> Backward:
    """About 8,192 elements in flight a multiprocessor, pipelined: one program of eight warps, or two of four where rows
    are short. More programs would write more partial rows.
    """
    block_n = triton.next_power_of_2(width)
    short = block_n <= 512
    block_m = max(1, (4096 if short else 8192) // block_n)
    num_warps = 4 if short else 16 if block_n > 8192 else 8
    return Backward(block_m, num_warps, 2 if short else 1, stages_that_fit(device, 2, block_m * block_n * itemsize))


def stages_that_fit(device: torch.device, streams: int, tile_bytes: int, most: int = 3) -> int:
    """Of the pipeline of backward, which reads this many streams by tiles: all but the current stage lie in shared
    memory."""
    return 1 + min(most - 1, (shared_bytes(device) - _SCRATCH_BYTES) // (streams * tile_bytes))


def _backward_alternatives(device: torch.device, width: int, itemsize: int) -> Iterator[Backward]:
    """More programs, smaller tiles, more warps, a shallower or a deeper pipeline."""
    block_m, num_warps, per_sm, stages = _backward_launch(device, width, itemsize)
    half = max(1, block_m // 2)
    deepest = stages_that_fit(device, 2, half * triton.next_power_of_2(width) * itemsize, most=stages + 1)
    yield Backward(block_m, num_warps, 2 * per_sm, min(2, stages))
    yield Backward(half, num_warps, 2 * per_sm, stages)
    yield Backward(half, num_warps, per_sm, deepest)
    yield Backward(block_m, min(16, 2 * num_warps), per_sm, stages)


_FORWARD = Tunable("rms_norm_triton_fwd_kernel", forward_launch, forward_alternatives)
_BACKWARD = Tunable("rms_norm_triton_bwd_kernel", _backward_launch, _backward_alternatives)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, weight = as_rows(x), weight.contiguous()
    n_rows, width = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if n_rows:
        block_m, num_warps = _FORWARD(x.device, width=width, itemsize=x.element_size())
        rms_norm_triton_fwd_kernel[(triton.cdiv(n_rows, block_m),)](
            rows, weight, y, rstd, rows.stride(0), n_rows,
            N=width, EPS=eps, BLOCK_M=block_m, BLOCK_N=triton.next_power_of_2(width), num_warps=num_warps,
        )  # fmt: skip
    return y, rstd


def _fake_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    n_rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty((n_rows,), dtype=torch.float32)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dy_rows, x_rows, weight = as_rows(dy), as_rows(x), weight.contiguous()
    n_rows, width = x_rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_m, num_warps, per_sm, stages = _BACKWARD(x.device, width=width, itemsize=x.element_size())
    n_programs = max(1, min(triton.cdiv(n_rows, block_m), sm_count(x.device) * per_sm))
    partial = torch.empty((n_programs, width), dtype=torch.float32, device=x.device)
    rms_norm_triton_bwd_kernel[(n_programs,)](
        dy_rows, x_rows, weight, rstd, dx, partial, dy_rows.stride(0), x_rows.stride(0), n_rows,
        N=width, BLOCK_M=block_m, BLOCK_N=triton.next_power_of_2(width), STAGES=stages, num_warps=num_warps,
    )  # fmt: skip
    return dx, sum_of_partials(partial, weight.dtype)


def sum_of_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's gradient [width] from the programs' partial rows [programs, width], added up in a fixed order.

    PyTorch's sum takes a few programs only, each of which reads its columns' rows one after the other.
    """
    n_partials, width = partial.shape
    gradient = torch.empty(width, dtype=dtype, device=partial.device)
    block_m, block_n = 256, 16
    norm_weight_gradient_kernel[(triton.cdiv(width, block_n),)](
        partial, gradient, n_partials, N=width, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8
    )
    return gradient


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_operator = make_operator(
    "llmmed::rms_norm_triton",
    forward=_forward,
    fake_forward=_fake_forward,
    backward=_backward,
    fake_backward=_fake_backward,
    save=lambda arguments, results: (arguments[0], arguments[1], results[1]),
    gradients=("x", "weight"),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`. Widths up to 16,384; raises `ValueError` beyond."""
    if x.shape[-1] > _MAX_WIDTH:
        raise ValueError(f"rms_norm (triton): width {x.shape[-1]} is over {_MAX_WIDTH}")
    result: Tensor = _operator(x, weight, eps)
    return result


def _load() -> Callable[..., Any]:
    require_triton()
    return rms_norm


IMPL = Implementation(
    "triton",
    load=_load,
    devices=TRITON_DEVICES,
    kernel_names=("rms_norm_triton_fwd_kernel", "rms_norm_triton_bwd_kernel"),
    tunable=(_FORWARD, _BACKWARD),
)
