"""`attention` in Triton: FlashAttention-2 (Dao 2023), causal, grouped queries, forward and backward without atomics.

Backward recomputes the scores twice, once for the keys' and values' gradients and once for the queries': two products
more than with atomic additions, and the same bits in every run.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.attention.loops import (
    MOST_SEQUENCES,
    attend,
    is_long,
    kernel_constants,
    key_gradients,
    launch_shape,
    load_tile,
    padded,
    query_gradient,
    store_tile,
    tunable,
    wide,
)
from llmmed.kernels.base import Implementation
from llmmed.kernels.operator import TRITON_DEVICES, make_operator, require_triton, unit_stride


@triton.jit
def attention_triton_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, seq,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    q_seq, k_seq, v_seq = wide(q_seq, LONG), wide(k_seq, LONG), wide(v_seq, LONG)
    # The longest rows of blocks first, so that the last programs to start are the short ones.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + (head // GROUP) * k_head
    v_ptr += batch * v_batch + (head // GROUP) * v_head
    rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q = load_tile(q_ptr, rows, q_seq, dims, seq, HEAD_DIM, EVEN)

    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    diagonal = block * BLOCK_M
    acc, total, peak = attend(acc, total, peak, q, k_ptr, v_ptr, k_seq, v_seq, rows, 0, diagonal, seq, SCALE,
                              HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, False, EVEN, PRECISION)  # fmt: skip
    acc, total, peak = attend(acc, total, peak, q, k_ptr, v_ptr, k_seq, v_seq, rows, diagonal,
                              tl.minimum(diagonal + BLOCK_M, seq), seq, SCALE,
                              HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, True, EVEN, PRECISION)  # fmt: skip
    out_ptr += (batch * seq * HEADS + head) * HEAD_DIM
    store_tile(out_ptr, acc / total[:, None], rows, wide(HEADS * HEAD_DIM, LONG), dims, seq, HEAD_DIM)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * seq + rows, peak + tl.log2(total), mask=rows < seq)


@triton.jit
def attention_triton_bwd_delta_kernel(
    out_ptr, dout_ptr, delta_ptr, d_batch, d_seq, d_head, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    rows, dims = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    out_ptr += (batch * seq * HEADS + head) * HEAD_DIM
    out = load_tile(out_ptr, rows, wide(HEADS * HEAD_DIM, LONG), dims, seq, HEAD_DIM, False).to(tl.float32)
    d_seq = wide(d_seq, LONG)
    dout = load_tile(dout_ptr + batch * d_batch + head * d_head, rows, d_seq, dims, seq, HEAD_DIM, False).to(tl.float32)
    tl.store(delta_ptr + tl.program_id(1).to(tl.int64) * seq + rows, tl.sum(out * dout, axis=1), mask=rows < seq)


@triton.jit
def attention_triton_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, d_batch, d_seq, d_head, seq,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    KV_HEADS: tl.constexpr = HEADS // GROUP
    q_seq, k_seq, v_seq, d_seq = wide(q_seq, LONG), wide(k_seq, LONG), wide(v_seq, LONG), wide(d_seq, LONG)
    batch, kv_head = (tl.program_id(1) // KV_HEADS).to(tl.int64), (tl.program_id(1) % KV_HEADS).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    cols, dims = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k = load_tile(k_ptr + batch * k_batch + kv_head * k_head, cols, k_seq, dims, seq, HEAD_DIM, EVEN)
    v = load_tile(v_ptr + batch * v_batch + kv_head * v_head, cols, v_seq, dims, seq, HEAD_DIM, EVEN)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head_ptr = q_ptr + batch * q_batch + head * q_head
        d_head_ptr = dout_ptr + batch * d_batch + head * d_head
        statistics = (batch * HEADS + head) * seq
        # Blocks on the diagonal are masked; BLOCK_M divides BLOCK_N, so the rest need no mask.
        dk, dv = key_gradients(dk, dv, k, v, q_head_ptr, d_head_ptr, lse_ptr + statistics, delta_ptr + statistics,
                               q_seq, d_seq, cols, first, tl.minimum(first + BLOCK_N, seq), seq, SCALE,
                               HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_M, True, EVEN, PRECISION)  # fmt: skip
        dk, dv = key_gradients(dk, dv, k, v, q_head_ptr, d_head_ptr, lse_ptr + statistics, delta_ptr + statistics,
                               q_seq, d_seq, cols, first + BLOCK_N, seq, seq, SCALE,
                               HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_M, False, EVEN, PRECISION)  # fmt: skip
    out = (batch * seq * KV_HEADS + kv_head) * HEAD_DIM
    # SCALE carries log2(e) for exp2; the gradient of the scores does not.
    stride = wide(KV_HEADS * HEAD_DIM, LONG)
    store_tile(dk_ptr + out, dk * (SCALE * 0.6931471805599453), cols, stride, dims, seq, HEAD_DIM)
    store_tile(dv_ptr + out, dv, cols, stride, dims, seq, HEAD_DIM)


@triton.jit
def attention_triton_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, d_batch, d_seq, d_head, seq,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    q_seq, k_seq, v_seq, d_seq = wide(q_seq, LONG), wide(k_seq, LONG), wide(v_seq, LONG), wide(d_seq, LONG)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    k_ptr += batch * k_batch + (head // GROUP) * k_head
    v_ptr += batch * v_batch + (head // GROUP) * v_head
    rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q = load_tile(q_ptr + batch * q_batch + head * q_head, rows, q_seq, dims, seq, HEAD_DIM, EVEN)
    dout = load_tile(dout_ptr + batch * d_batch + head * d_head, rows, d_seq, dims, seq, HEAD_DIM, EVEN)
    statistics = tl.program_id(1).to(tl.int64) * seq + rows
    lse = tl.load(lse_ptr + statistics, mask=rows < seq, other=float("inf"))
    delta = tl.load(delta_ptr + statistics, mask=rows < seq, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    diagonal = block * BLOCK_M
    dq = query_gradient(dq, q, dout, lse, delta, k_ptr, v_ptr, k_seq, v_seq, rows, 0, diagonal, seq, SCALE,
                        HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, False, EVEN, PRECISION)  # fmt: skip
    dq = query_gradient(dq, q, dout, lse, delta, k_ptr, v_ptr, k_seq, v_seq, rows, diagonal,
                        tl.minimum(diagonal + BLOCK_M, seq), seq, SCALE,
                        HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, True, EVEN, PRECISION)  # fmt: skip
    dq_ptr += (batch * seq * HEADS + head) * HEAD_DIM
    store_tile(dq_ptr, dq * (SCALE * 0.6931471805599453), rows, wide(HEADS * HEAD_DIM, LONG), dims, seq, HEAD_DIM)


_FORWARD = tunable("attention_triton_fwd_kernel", 0)
_KEYS = tunable("attention_triton_bwd_kv_kernel", 1)
_QUERIES = tunable("attention_triton_bwd_q_kernel", 2)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = map(unit_stride, (q, k, v))
    batch, seq, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seq), dtype=torch.float32, device=q.device)  # in powers of two
    launch = _FORWARD(q.device, **launch_shape(q, k))
    attention_triton_fwd_kernel[(triton.cdiv(seq, launch.rows), batch * heads)](
        q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], seq,
        BLOCK_M=launch.rows, BLOCK_N=launch.cols, LONG=is_long(q, k, v), **kernel_constants(q, k, launch),
    )  # fmt: skip
    return out, lse


def _fake_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, seq, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seq), dtype=torch.float32)


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = map(unit_stride, (q, k, v))
    dout = dout.contiguous()  # as a step hands it over; other strides would be other kernels, each compiled for seconds
    batch, seq, heads, head_dim = q.shape
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for_keys, for_queries = (each(q.device, **launch_shape(q, k)) for each in (_KEYS, _QUERIES))
    strides = [stride for x in (q, k, v, dout) for stride in x.stride()[:3]]
    long = is_long(q, k, v)
    attention_triton_bwd_delta_kernel[(triton.cdiv(seq, 64), batch * heads)](
        out, dout, delta, *dout.stride()[:3], seq,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=64, LONG=long,
    )  # fmt: skip
    attention_triton_bwd_kv_kernel[(triton.cdiv(seq, for_keys.rows), batch * k.shape[2])](
        q, k, v, dout, lse, delta, dk, dv, *strides, seq,
        BLOCK_M=for_keys.cols, BLOCK_N=for_keys.rows, LONG=long, **kernel_constants(q, k, for_keys),
    )  # fmt: skip
    attention_triton_bwd_q_kernel[(triton.cdiv(seq, for_queries.rows), batch * heads)](
        q, k, v, dout, lse, delta, dq, *strides, seq,
        BLOCK_M=for_queries.rows, BLOCK_N=for_queries.cols, LONG=long, **kernel_constants(q, k, for_queries),
    )  # fmt: skip
    return dq, dk, dv


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_operator = make_operator(
    "llmmed::attention_triton",
    forward=_forward,
    fake_forward=_fake_forward,
    backward=_backward,
    fake_backward=_fake_backward,
    save=lambda arguments, results: (*arguments, *results),
    gradients=("q", "k", "v"),
)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference.attention`. Batch times heads may be 65,535; raises `ValueError` beyond."""
    if q.shape[0] * q.shape[2] > MOST_SEQUENCES:
        raise ValueError(f"attention (triton): batch times heads is {q.shape[0] * q.shape[2]}, over {MOST_SEQUENCES}")
    result: Tensor = _operator(q, k, v)
    return result


def _load_impl() -> Callable[..., Any]:
    require_triton()
    return attention


IMPL = Implementation(
    "triton",
    load=_load_impl,
    devices=TRITON_DEVICES,
    kernel_names=("attention_triton_fwd_kernel", "attention_triton_bwd_kv_kernel", "attention_triton_bwd_q_kernel"),
    tunable=(_FORWARD, _KEYS, _QUERIES),
)
