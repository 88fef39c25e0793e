"""What `attention` and `rotary_attention` in Triton share: the loops over keys and over queries, and their launches."""

# Annotations must be real objects: torch infers an operator's schema from them. So no `from __future__` here.
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.operator import input_precision, shared_bytes
from llmmed.kernels.tunable import Tunable

MOST_SEQUENCES = 65535  # CUDA's limit for the second axis of a grid

_LOG2_E = 1.4426950408889634


class Launch(NamedTuple):
    """Block sizes and resources of one kernel. `rows` are the queries or keys that a program owns, a
    multiple of `cols`: blocks beside the diagonal then need no mask."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int


@triton.jit
def wide(stride, LONG: tl.constexpr):
    """A stride in 64 bits where positions times it do not fit into 32, which cost registers."""
    if LONG:
        return stride + tl.full((), 0, tl.int64)
    else:
        return stride


@triton.jit
def load_tile(ptr, rows, stride, cols, seq, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr):
    """A [rows, head_dim] tile; rows past the end and padding of the head read as zero."""
    pointers = ptr + rows[:, None] * stride + cols[None, :]
    if EVEN and cols.shape[0] == HEAD_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows < seq)[:, None] & (cols < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_row(ptr, rows, seq, other, EVEN: tl.constexpr):
    """One number a row; `other` past the end."""
    if EVEN:
        return tl.load(ptr + rows)
    return tl.load(ptr + rows, mask=rows < seq, other=other)


@triton.jit
def store_tile(ptr, values, rows, stride, cols, seq, HEAD_DIM: tl.constexpr):
    mask = (rows < seq)[:, None] & (cols < HEAD_DIM)[None, :]
    tl.store(ptr + rows[:, None] * stride + cols[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def attend(
    acc, total, peak, q, k_ptr, v_ptr, k_stride, v_stride, rows, lo, hi, seq, scale,
    ROW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # ROW is what a row of keys has in memory: HEAD_DIM, or BLOCK_D where the padding is there, too.
    dims = tl.arange(0, BLOCK_D)
    for start in tl.range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, cols, k_stride, dims, seq, ROW, EVEN or not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            scores = tl.where(rows[:, None] >= cols[None, :], scores, float("-inf"))
        # Scaled where the maximum is taken off, in one multiply-add.
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        p = tl.exp2(scores * scale - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(p, axis=1)
        v = load_tile(v_ptr, cols, v_stride, dims, seq, HEAD_DIM, EVEN or not MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit
def key_gradients(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_stride, d_stride, cols, lo, hi, seq, scale,
    ROW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    for start in tl.range(lo, hi, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr, rows, q_stride, dims, seq, ROW, EVEN)
        lse = load_row(lse_ptr, rows, seq, float("inf"), EVEN)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])  # [keys, queries]
        if MASKED:
            p = tl.where(rows[None, :] >= cols[:, None], p, 0.0)
        dout = load_tile(dout_ptr, rows, d_stride, dims, seq, HEAD_DIM, EVEN)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        delta = load_row(delta_ptr, rows, seq, 0.0, EVEN)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def query_gradient(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, rows, lo, hi, seq, scale,
    ROW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    for start in tl.range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, cols, k_stride, dims, seq, ROW, EVEN or not MASKED)
        v = load_tile(v_ptr, cols, v_stride, dims, seq, HEAD_DIM, EVEN or not MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
        if MASKED:
            p = tl.where(rows[:, None] >= cols[None, :], p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    return dq


def launches(head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Launch, Launch, Launch]:
    """Launch parameters of the forward, the keys' and the queries' kernels for a head size and dtype.

    At a head of 128 the queries' kernel takes 128 KiB of shared memory for its pipeline where there is as much.
    """
    if dtype == torch.float32:
        return Launch(32, 32, 4, 2), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1)
    if head_dim <= 64:
        return Launch(64, 64, 4, 3), Launch(64, 32, 4, 3), Launch(64, 64, 4, 3)
    if shared_bytes(device) < 2**17:
        return Launch(64, 64, 4, 2), Launch(64, 64, 4, 1), Launch(64, 64, 4, 2)
    return Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(128, 64, 8, 3)


def padded(head_dim: int) -> int:
    """The columns of a tile: a product on tensor cores takes no fewer than 16."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def _alternatives(head_dim: int, itemsize: int) -> tuple[tuple[Launch, ...], ...]:
    """What to try of each kernel. In float32 products without tensor cores decide, and compile for long."""
    if itemsize == 4:
        return (), (), ()
    if head_dim <= 64:
        return (
            (Launch(128, 64, 4, 3), Launch(128, 64, 8, 3), Launch(128, 128, 8, 3), Launch(64, 64, 4, 4)),
            (Launch(64, 64, 4, 3), Launch(128, 32, 8, 3), Launch(128, 64, 8, 3)),
            (Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 32, 4, 3)),
        )
    return (
        (Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(128, 128, 8, 2), Launch(64, 64, 4, 2)),
        (Launch(64, 32, 4, 2), Launch(128, 64, 8, 2), Launch(64, 64, 8, 2)),
        (Launch(64, 64, 4, 2), Launch(128, 64, 8, 2), Launch(64, 32, 4, 3)),
    )


def tunable(kernel: str, index: int) -> Tunable[Launch]:
    """Of the forward (0), the keys' (1) or the queries' kernel (2)."""

    def default(device: torch.device, head_dim: int, itemsize: int, seq: int, group: int) -> Launch:
        return launches(head_dim, torch.float32 if itemsize == 4 else torch.bfloat16, device)[index]

    def alternatives(device: torch.device, head_dim: int, itemsize: int, seq: int, group: int) -> Iterable[Launch]:
        return _alternatives(head_dim, itemsize)[index]

    return Tunable(kernel, default, alternatives)


def launch_shape(q: Tensor, k: Tensor) -> dict[str, int]:
    """What launches depend on. On the length and on the group only once a search has been made."""
    _, seq, heads, head_dim = q.shape
    return {"head_dim": head_dim, "itemsize": q.element_size(), "seq": seq, "group": heads // k.shape[2]}


def kernel_constants(q: Tensor, k: Tensor, launch: Launch) -> dict[str, Any]:
    """What all three kernels are specialised on."""
    seq, heads, head_dim = q.shape[1:]
    return {
        "HEADS": heads,
        "GROUP": heads // k.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "SCALE": head_dim**-0.5 * _LOG2_E,
        "EVEN": seq % launch.rows == 0 and seq % launch.cols == 0,
        # The same rule as PyTorch's own products, so that neither side of a comparison is more exact by decree.
        "PRECISION": input_precision(q.dtype),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def is_long(*tensors: Tensor) -> bool:
    """Whether some position lies 2^31 elements or more from the first, here or in a dense result of the same shape."""
    return any(x.shape[1] * max(x.stride(1), x.shape[2] * x.shape[3]) >= 2**31 for x in tensors)
