"""`add_rms_norm` in Triton: the sum and its norm in one pass over memory forward, one backward.

Backward reads the sum again, which is an output and kept anyway. The gradients of x and of the residual are the same
numbers, written once. The weight's gradient is summed as in `rms_norm`: deterministic, float32 throughout.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.operator import TRITON_DEVICES, as_rows, make_operator, require_triton, sm_count
from llmmed.kernels.rms_norm.triton_impl import (
    Backward,
    forward_alternatives,
    forward_launch,
    stages_that_fit,
    sum_of_partials,
)
from llmmed.kernels.tunable import Tunable

_MAX_WIDTH = 16384  # a row must fit into one program's registers


@triton.jit
def add_rms_norm_triton_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, rstd_ptr, x_stride, residual_stride, n_rows,
    N: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_mask = rows < n_rows
    mask = row_mask[:, None] & (cols < N)[None, :]
    rows64 = rows.to(tl.int64)
    x = tl.load(x_ptr + rows64[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + rows64[:, None] * residual_stride + cols[None, :], mask=mask, other=0.0)
    # What is normalised is the rounded sum, which backward reads again.
    rounded = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
    out = rows64[:, None] * N + cols[None, :]
    tl.store(total_ptr + out, rounded, mask=mask)
    total = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(total * total, axis=1) / N + EPS)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    normed = total * rstd[:, None] * weight[None, :]
    tl.store(normed_ptr + out, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows64, rstd, mask=row_mask)


@triton.jit
def add_rms_norm_triton_bwd_kernel(
    dnormed_ptr, dtotal_ptr, total_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr,
    dnormed_stride, dtotal_stride, n_rows,
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
        rows64 = rows.to(tl.int64)[:, None]
        dnormed = tl.load(dnormed_ptr + rows64 * dnormed_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + rows64 * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dtotal = tl.load(dtotal_ptr + rows64 * dtotal_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
        x_hat = total * rstd[:, None]
        scaled = dnormed * weight[None, :]
        dweight += dnormed * x_hat
        projection = tl.sum(scaled * x_hat, axis=1) / N
        dx = (scaled - x_hat * projection[:, None]) * rstd[:, None] + dtotal
        tl.store(dx_ptr + rows64 * N + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * N + cols, tl.sum(dweight, axis=0), mask=col_mask)


def _backward_launch(device: torch.device, width: int, itemsize: int) -> Backward:
    """As in `rms_norm`, but with three streams to read a tile may hold half as much for the same bytes in flight. More
    programs would write more partial rows.
    """
    block_n = triton.next_power_of_2(width)
    block_m = max(1, 4096 // block_n)
    num_warps = max(8, block_n // 512)
    per_sm = 2 if block_n <= 4096 and itemsize == 2 else 1
    return Backward(block_m, num_warps, per_sm, stages_that_fit(device, 3, block_m * block_n * itemsize))


def _backward_alternatives(device: torch.device, width: int, itemsize: int) -> Iterator[Backward]:
    """More programs, smaller tiles, other numbers of warps."""
    block_m, num_warps, per_sm, stages = _backward_launch(device, width, itemsize)
    half = max(1, block_m // 2)
    half_stages = stages_that_fit(device, 3, half * triton.next_power_of_2(width) * itemsize)
    yield Backward(block_m, num_warps, 3 - per_sm, stages)
    yield Backward(half, num_warps, 2 * per_sm, half_stages)
    yield Backward(half, num_warps // 2, 2 * per_sm, half_stages)
    yield Backward(block_m, min(16, 2 * num_warps), per_sm, stages)


_FORWARD = Tunable("add_rms_norm_triton_fwd_kernel", forward_launch, forward_alternatives)
_BACKWARD = Tunable("add_rms_norm_triton_bwd_kernel", _backward_launch, _backward_alternatives)


def _forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x_rows, residual_rows, weight = as_rows(x), as_rows(residual), weight.contiguous()
    n_rows, width = x_rows.shape
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if n_rows:
        block_m, num_warps = _FORWARD(x.device, width=width, itemsize=x.element_size())
        add_rms_norm_triton_fwd_kernel[(triton.cdiv(n_rows, block_m),)](
            x_rows, residual_rows, weight, normed, total, rstd, x_rows.stride(0), residual_rows.stride(0), n_rows,
            N=width, EPS=eps, BLOCK_M=block_m, BLOCK_N=triton.next_power_of_2(width), num_warps=num_warps,
        )  # fmt: skip
    return normed, total, rstd


def _fake_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    n_rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((n_rows,), dtype=torch.float32)


def _backward(dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dnormed_rows, dtotal_rows, weight = as_rows(dnormed), as_rows(dtotal), weight.contiguous()
    n_rows, width = dnormed_rows.shape
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    block_m, num_warps, per_sm, stages = _BACKWARD(total.device, width=width, itemsize=total.element_size())
    n_programs = max(1, min(triton.cdiv(n_rows, block_m), sm_count(total.device) * per_sm))
    partial = torch.empty((n_programs, width), dtype=torch.float32, device=total.device)
    add_rms_norm_triton_bwd_kernel[(n_programs,)](
        dnormed_rows, dtotal_rows, total, weight, rstd, dx, partial,
        dnormed_rows.stride(0), dtotal_rows.stride(0), n_rows,
        N=width, BLOCK_M=block_m, BLOCK_N=triton.next_power_of_2(width), STAGES=stages, num_warps=num_warps,
    )  # fmt: skip
    return dx, sum_of_partials(partial, weight.dtype)


def _fake_backward(
    dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


_operator = make_operator(
    "llmmed::add_rms_norm_triton",
    forward=_forward,
    fake_forward=_fake_forward,
    backward=_backward,
    fake_backward=_fake_backward,
    save=lambda arguments, results: (results[1], arguments[2], results[2]),
    gradients=("x", "residual", "weight"),
    spread=lambda dx, dweight: (dx, dx, dweight),
    n_outputs=2,
)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`. Widths up to 16,384, beyond 8,192 with spills; raises `ValueError` past that."""
    if x.shape[-1] > _MAX_WIDTH:
        raise ValueError(f"add_rms_norm (triton): width {x.shape[-1]} is over {_MAX_WIDTH}")
    normed, new_residual = _operator(x, residual, weight, eps)
    return normed, new_residual


def _load() -> Callable[..., Any]:
    require_triton()
    return add_rms_norm


IMPL = Implementation(
    "triton",
    load=_load,
    devices=TRITON_DEVICES,
    kernel_names=("add_rms_norm_triton_fwd_kernel", "add_rms_norm_triton_bwd_kernel"),
    tunable=(_FORWARD, _BACKWARD),
)
