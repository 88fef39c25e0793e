"""`rotary` in Triton: queries and keys in one launch, read once and written once; backward rotates the other way."""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.operator import TRITON_DEVICES, make_operator, require_triton, unit_stride
from llmmed.kernels.tunable import Tunable

_ROWS = 16  # heads of positions that a program rotates


@triton.jit
def _rotate_tile(
    x_ptr, y_ptr, cos_ptr, sin_ptr, batch_stride, seq_stride, head_stride, n_rows, block, seq,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    # A row is one head of one position: rows run over batch, position, head, as the output lies in memory.
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_HALF)
    mask = (rows < n_rows)[:, None] & (cols < HALF)[None, :]
    token = rows // HEADS
    position = (token % seq).to(tl.int64)
    base = (
        (token // seq).to(tl.int64) * batch_stride + position * seq_stride + (rows % HEADS).to(tl.int64) * head_stride
    )
    x = x_ptr + base[:, None] + cols[None, :]
    x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    table = position[:, None] * HALF + cols[None, :]
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0) * SIGN
    y = y_ptr + rows.to(tl.int64)[:, None] * (2 * HALF) + cols[None, :]
    tl.store(y, (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y + HALF, (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_triton_fwd_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, n_q_rows, n_k_rows, n_q_blocks, seq,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block < n_q_blocks:
        _rotate_tile(q_ptr, q_out_ptr, cos_ptr, sin_ptr, q_batch, q_seq, q_head, n_q_rows, block, seq,
                     Q_HEADS, HALF, BLOCK_M, BLOCK_HALF, 1.0)  # fmt: skip
    else:
        _rotate_tile(k_ptr, k_out_ptr, cos_ptr, sin_ptr, k_batch, k_seq, k_head, n_k_rows, block - n_q_blocks, seq,
                     K_HEADS, HALF, BLOCK_M, BLOCK_HALF, 1.0)  # fmt: skip


@triton.jit
def rotary_triton_bwd_kernel(
    dq_ptr, dk_ptr, dq_out_ptr, dk_out_ptr, cos_ptr, sin_ptr,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, n_q_rows, n_k_rows, n_q_blocks, seq,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block < n_q_blocks:
        _rotate_tile(dq_ptr, dq_out_ptr, cos_ptr, sin_ptr, q_batch, q_seq, q_head, n_q_rows, block, seq,
                     Q_HEADS, HALF, BLOCK_M, BLOCK_HALF, -1.0)  # fmt: skip
    else:
        _rotate_tile(dk_ptr, dk_out_ptr, cos_ptr, sin_ptr, k_batch, k_seq, k_head, n_k_rows, block - n_q_blocks, seq,
                     K_HEADS, HALF, BLOCK_M, BLOCK_HALF, -1.0)  # fmt: skip


class Launch(NamedTuple):
    """Heads of positions that a program rotates, and its warps."""

    block_m: int
    num_warps: int


def _launch(device: torch.device, half: int, itemsize: int) -> Launch:
    return Launch(_ROWS, 4)


def _alternatives(device: torch.device, half: int, itemsize: int) -> Iterator[Launch]:
    block_m, num_warps = _launch(device, half, itemsize)
    yield Launch(block_m, 2 * num_warps)
    yield Launch(2 * block_m, 2 * num_warps)
    yield Launch(4 * block_m, num_warps)
    yield Launch(block_m // 2, num_warps)


_FORWARD = Tunable("rotary_triton_fwd_kernel", _launch, _alternatives)
_BACKWARD = Tunable("rotary_triton_bwd_kernel", _launch, _alternatives)


def _rotate(
    kernel: triton.JITFunction, launch: Tunable[Launch], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    q, k = unit_stride(q), unit_stride(k)
    batch, seq, q_heads, head_dim = q.shape
    k_heads, half = k.shape[2], head_dim // 2
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    block_half = triton.next_power_of_2(half)
    block_m, num_warps = launch(q.device, half=half, itemsize=q.element_size())
    n_q_rows, n_k_rows = batch * seq * q_heads, batch * seq * k_heads
    n_q_blocks, n_k_blocks = triton.cdiv(n_q_rows, block_m), triton.cdiv(n_k_rows, block_m)
    if n_q_rows:
        kernel[(n_q_blocks + n_k_blocks,)](
            q, k, q_out, k_out, cos.contiguous(), sin.contiguous(),
            *q.stride()[:3], *k.stride()[:3], n_q_rows, n_k_rows, n_q_blocks, seq,
            Q_HEADS=q_heads, K_HEADS=k_heads, HALF=half, BLOCK_M=block_m, BLOCK_HALF=block_half, num_warps=num_warps,
        )  # fmt: skip
    return q_out, k_out


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(rotary_triton_fwd_kernel, _FORWARD, q, k, cos, sin)


def _backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(rotary_triton_bwd_kernel, _BACKWARD, dq, dk, cos, sin)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_operator = make_operator(
    "llmmed::rotary_triton",
    forward=_forward,
    fake_forward=_fake,
    backward=_backward,
    fake_backward=_fake,
    save=lambda arguments, results: (arguments[2], arguments[3]),
    gradients=("q", "k"),
    n_outputs=2,
)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.rotary`."""
    q_out, k_out = _operator(q, k, cos, sin)
    return q_out, k_out


def _load() -> Callable[..., Any]:
    require_triton()
    return rotary


IMPL = Implementation(
    "triton",
    load=_load,
    devices=TRITON_DEVICES,
    kernel_names=("rotary_triton_fwd_kernel", "rotary_triton_bwd_kernel"),
    tunable=(_FORWARD, _BACKWARD),
)
