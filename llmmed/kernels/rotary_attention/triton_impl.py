"""`rotary_attention` in Triton: the loops of `attention`, over the fused projection as it lies in memory.

Forward rotates the keys in a kernel of their own, because every block of queries reads them, and each block of queries
where it is used. Backward turns the gradients of both back in registers and writes one gradient of the projection.

Hopper has kernels of its own for the most common shapes, in `hopper*.py`; those here run everywhere, and where a search
finds them faster.

Rotated queries and keys are kept as tiles take them: [batch, heads, seq, first half | second half], each half padded
with zeros to a power of two. Products over head_dim do not mind the order, and a tile comes apart into its halves.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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
)
from llmmed.kernels.base import Implementation
from llmmed.kernels.operator import (
    INTERPRETED,
    TRITON_DEVICES,
    capability,
    describable,
    make_operator,
    require_triton,
    unit_stride,
)
from llmmed.kernels.rotary_attention.hopper import suits
from llmmed.kernels.rotary_attention.hopper_backward import differentiate
from llmmed.kernels.rotary_attention.hopper_forward import attend as attend_on_hopper
from llmmed.kernels.tunable import Tunable

LOOPS, SPECIALISED = 0, 1
"""How: in the loops that run everywhere, or in Hopper's kernels, whose warps have tasks of their own."""


class Pass(NamedTuple):
    """How to compute a pass that Hopper's kernels can compute."""

    how: int


_TILE = 4096  # elements that a program of the keys' prepass rotates: 32 a thread with four warps


@triton.jit
def _rotate(
    x, y, inside, positions, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rotates the heads that begin at pointers `x` by their positions into rows of BLOCK_D that begin at `y`."""
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_HALF: tl.constexpr = BLOCK_D // 2
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = inside[:, None] & (cols < HALF)
    first = tl.load(x[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x[:, None] + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    table = positions[:, None] * HALF + cols
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
    to = y[:, None] + cols
    tl.store(to, (first * cos - second * sin).to(y.dtype.element_ty), mask=inside[:, None])
    tl.store(to + BLOCK_HALF, (second * cos + first * sin).to(y.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _store_turned_back(
    ptr, tile, rows, stride, cos_ptr, sin_ptr, seq, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Stores the gradient of heads, given that of what `_rotate` made of them."""
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_HALF: tl.constexpr = BLOCK_D // 2
    first, second = tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, BLOCK_HALF)), (0, 2, 1)))
    cols = tl.arange(0, BLOCK_HALF)
    mask = (rows < seq)[:, None] & (cols < HALF)[None, :]
    table = rows[:, None] * HALF + cols[None, :]
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
    to = ptr + rows[:, None] * stride + cols[None, :]
    tl.store(to, (first * cos + second * sin).to(ptr.dtype.element_ty), mask=mask)
    tl.store(to + HALF, (second * cos - first * sin).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_attention_triton_keys_kernel(
    k_ptr, cos_ptr, sin_ptr, k_rot_ptr, k_batch, k_seq, k_head, n_rows, seq,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # A row is one head of one position: rows run over batch, position, head, as the projection lies in memory.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = rows // KV_HEADS, (rows % KV_HEADS).to(tl.int64)
    batch, position = (token // seq).to(tl.int64), token % seq
    k = k_ptr + batch * k_batch + position.to(tl.int64) * k_seq + head * k_head
    k_rot = k_rot_ptr + ((batch * KV_HEADS + head) * seq + position) * BLOCK_D
    _rotate(k, k_rot, rows < n_rows, position, cos_ptr, sin_ptr, HEAD_DIM, BLOCK_D)


@triton.jit
def rotary_attention_triton_fwd_kernel(
    q_ptr, k_rot_ptr, v_ptr, cos_ptr, sin_ptr, q_rot_ptr, out_ptr, lse_ptr, x_batch, x_seq, x_head, seq,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The longest rows of blocks first, so that the last programs to start are the short ones.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    kv_head = head // GROUP
    k_rot_ptr += (batch * (HEADS // GROUP) + kv_head) * seq * BLOCK_D
    v_ptr += batch * x_batch + kv_head * x_head
    rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_ptr += batch * x_batch + head * x_head
    q_rot_ptr += (batch * HEADS + head) * seq * BLOCK_D
    _rotate(q_ptr + rows * x_seq, q_rot_ptr + rows * BLOCK_D, rows < seq, rows, cos_ptr, sin_ptr, HEAD_DIM, BLOCK_D)
    # Read back, because a product takes what is loaded from shared memory and what is computed from scarce registers.
    tl.debug_barrier()
    q = load_tile(q_rot_ptr, rows, BLOCK_D, dims, seq, BLOCK_D, EVEN)

    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    diagonal = block * BLOCK_M
    acc, total, peak = attend(acc, total, peak, q, k_rot_ptr, v_ptr, BLOCK_D, x_seq, rows, 0, diagonal, seq, SCALE,
                              BLOCK_D, HEAD_DIM, BLOCK_D, BLOCK_N, False, EVEN, PRECISION)  # fmt: skip
    acc, total, peak = attend(acc, total, peak, q, k_rot_ptr, v_ptr, BLOCK_D, x_seq, rows, diagonal,
                              tl.minimum(diagonal + BLOCK_M, seq), seq, SCALE,
                              BLOCK_D, HEAD_DIM, BLOCK_D, BLOCK_N, True, EVEN, PRECISION)  # fmt: skip
    out_ptr += (batch * seq * HEADS + head) * HEAD_DIM
    store_tile(out_ptr, acc / total[:, None], rows, HEADS * HEAD_DIM, dims, seq, HEAD_DIM)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * seq + rows, peak + tl.log2(total), mask=rows < seq)


@triton.jit
def rotary_attention_triton_bwd_q_kernel(
    q_rot_ptr, k_rot_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    v_batch, v_seq, v_head, seq,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    KV_HEADS: tl.constexpr = HEADS // GROUP
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    kv_head = head // GROUP
    k_rot_ptr += (batch * KV_HEADS + kv_head) * seq * BLOCK_D
    v_ptr += batch * v_batch + kv_head * v_head
    rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    offset = (batch * seq * HEADS + head) * HEAD_DIM
    dout = load_tile(dout_ptr + offset, rows, HEADS * HEAD_DIM, dims, seq, HEAD_DIM, EVEN)
    out = load_tile(out_ptr + offset, rows, HEADS * HEAD_DIM, dims, seq, HEAD_DIM, EVEN)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    statistics = tl.program_id(1).to(tl.int64) * seq + rows
    tl.store(delta_ptr + statistics, delta, mask=rows < seq)  # for the keys' kernel, which comes next
    lse = tl.load(lse_ptr + statistics, mask=rows < seq, other=float("inf"))
    q = load_tile(q_rot_ptr + (batch * HEADS + head) * seq * BLOCK_D, rows, BLOCK_D, dims, seq, BLOCK_D, EVEN)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    diagonal = block * BLOCK_M
    dq = query_gradient(dq, q, dout, lse, delta, k_rot_ptr, v_ptr, BLOCK_D, v_seq, rows, 0, diagonal, seq, SCALE,
                        BLOCK_D, HEAD_DIM, BLOCK_D, BLOCK_N, False, EVEN, PRECISION)  # fmt: skip
    dq = query_gradient(dq, q, dout, lse, delta, k_rot_ptr, v_ptr, BLOCK_D, v_seq, rows, diagonal,
                        tl.minimum(diagonal + BLOCK_M, seq), seq, SCALE,
                        BLOCK_D, HEAD_DIM, BLOCK_D, BLOCK_N, True, EVEN, PRECISION)  # fmt: skip
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    # SCALE carries log2(e) for exp2; the gradient of the scores does not.
    _store_turned_back(dq_ptr + batch * seq * ROW + head * HEAD_DIM, dq * (SCALE * 0.6931471805599453), rows, ROW,
                       cos_ptr, sin_ptr, seq, HEAD_DIM, BLOCK_D)  # fmt: skip


@triton.jit
def rotary_attention_triton_bwd_kv_kernel(
    q_rot_ptr, k_rot_ptr, v_ptr, cos_ptr, sin_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    v_batch, v_seq, v_head, seq,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    KV_HEADS: tl.constexpr = HEADS // GROUP
    batch, kv_head = (tl.program_id(1) // KV_HEADS).to(tl.int64), (tl.program_id(1) % KV_HEADS).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    cols, dims = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k = load_tile(k_rot_ptr + (batch * KV_HEADS + kv_head) * seq * BLOCK_D, cols, BLOCK_D, dims, seq, BLOCK_D, EVEN)
    v = load_tile(v_ptr + batch * v_batch + kv_head * v_head, cols, v_seq, dims, seq, HEAD_DIM, EVEN)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        statistics = (batch * HEADS + head) * seq
        q_head_ptr = q_rot_ptr + statistics * BLOCK_D
        d_head_ptr = dout_ptr + (batch * seq * HEADS + head) * HEAD_DIM
        # Blocks on the diagonal are masked; BLOCK_M divides BLOCK_N, so the rest need no mask.
        dk, dv = key_gradients(dk, dv, k, v, q_head_ptr, d_head_ptr, lse_ptr + statistics, delta_ptr + statistics,
                               BLOCK_D, HEADS * HEAD_DIM, cols, first, tl.minimum(first + BLOCK_N, seq), seq, SCALE,
                               BLOCK_D, HEAD_DIM, BLOCK_D, BLOCK_M, True, EVEN, PRECISION)  # fmt: skip
        dk, dv = key_gradients(dk, dv, k, v, q_head_ptr, d_head_ptr, lse_ptr + statistics, delta_ptr + statistics,
                               BLOCK_D, HEADS * HEAD_DIM, cols, first + BLOCK_N, seq, seq, SCALE,
                               BLOCK_D, HEAD_DIM, BLOCK_D, BLOCK_M, False, EVEN, PRECISION)  # fmt: skip
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    to = batch * seq * ROW + kv_head * HEAD_DIM
    store_tile(dv_ptr + to, dv, cols, ROW, dims, seq, HEAD_DIM)
    _store_turned_back(dk_ptr + to, dk * (SCALE * 0.6931471805599453), cols, ROW,
                       cos_ptr, sin_ptr, seq, HEAD_DIM, BLOCK_D)  # fmt: skip


def _split(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, which have the projection's strides."""
    n_kv_heads = (qkv.shape[2] - n_heads) // 2
    q, k, v = qkv.split((n_heads, n_kv_heads, n_kv_heads), dim=2)
    return q, k, v


# By default as `attention` launches its own kernels, whose loops they are.
_FORWARD = tunable("rotary_attention_triton_fwd_kernel", 0)
_KEYS = tunable("rotary_attention_triton_bwd_kv_kernel", 1)
_QUERIES = tunable("rotary_attention_triton_bwd_q_kernel", 2)


def _rotate_keys(k: Tensor, cos: Tensor, sin: Tensor, block_d: int) -> Tensor:
    """[batch, n_kv_heads, seq, block_d]."""
    batch, seq, kv_heads, head_dim = k.shape
    k_rot = torch.empty((batch, kv_heads, seq, block_d), dtype=k.dtype, device=k.device)
    n_rows, block_m = batch * seq * kv_heads, _TILE // block_d
    rotary_attention_triton_keys_kernel[(triton.cdiv(n_rows, block_m),)](
        k, cos, sin, k_rot, *k.stride()[:3], n_rows, seq,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip
    return k_rot


def _pass(name: str) -> Tunable[Pass]:
    def default(device: torch.device, head_dim: int, itemsize: int, seq: int, group: int) -> Pass:
        return Pass(SPECIALISED)

    def alternatives(device: torch.device, **at: int) -> Iterable[Pass]:
        return (Pass(LOOPS),)

    return Tunable(name, default, alternatives)


_FORWARD_PASS = _pass("rotary_attention_hopper_fwd_kernel")
_BACKWARD_PASS = _pass("rotary_attention_hopper_bwd_kv_kernel")  # and the queries'


def _on_hopper(how: Tunable[Pass], q: Tensor, k: Tensor, qkv: Tensor, *others: Tensor) -> bool:
    """Whether a pass that reads this projection, of queries and keys, and these takes the kernels for Hopper."""
    if capability(qkv.device) != 90 or INTERPRETED or not suits(qkv) or not describable(qkv, *others):
        return False
    return how(qkv.device, **launch_shape(q, k)) == Pass(SPECIALISED)


def _forward(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv, cos, sin = unit_stride(qkv), cos.contiguous(), sin.contiguous()
    q, k, v = _split(qkv, n_heads)
    batch, seq, heads, _ = q.shape
    k_rot = _rotate_keys(k, cos, sin, padded(q.shape[3]))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seq), dtype=torch.float32, device=q.device)  # in powers of two
    q_rot = k_rot.new_empty((batch, heads, seq, padded(q.shape[3])))
    if _on_hopper(_FORWARD_PASS, q, k, qkv):
        attend_on_hopper(qkv, k_rot, cos, sin, q_rot, out, lse)
        return out, lse, q_rot, k_rot
    launch = _FORWARD(q.device, **launch_shape(q, k))
    rotary_attention_triton_fwd_kernel[(triton.cdiv(seq, launch.rows), batch * heads)](
        q, k_rot, v, cos, sin, q_rot, out, lse, *qkv.stride()[:3], seq,
        BLOCK_M=launch.rows, BLOCK_N=launch.cols, **kernel_constants(q, k, launch),
    )  # fmt: skip
    return out, lse, q_rot, k_rot


def _fake_forward(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, _ = _split(qkv, n_heads)
    batch, seq, heads, head_dim = q.shape
    block_d = padded(head_dim)
    return (
        q.new_empty(q.shape),
        q.new_empty((batch, heads, seq), dtype=torch.float32),
        q.new_empty((batch, heads, seq, block_d)),
        q.new_empty((batch, k.shape[2], seq, block_d)),
    )


def _backward(
    dout: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int,
    out: Tensor, lse: Tensor, q_rot: Tensor, k_rot: Tensor,
) -> tuple[Tensor]:  # fmt: skip
    qkv, cos, sin = unit_stride(qkv), cos.contiguous(), sin.contiguous()
    dout = dout.contiguous()  # as a step hands it over
    q, k, v = _split(qkv, n_heads)
    batch, seq, heads, _ = q.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if _on_hopper(_BACKWARD_PASS, q, k, qkv, dout):
        differentiate(dout, q_rot, k_rot, qkv, out, lse, cos, sin, dqkv)
        return (dqkv,)
    delta = torch.empty_like(lse)
    dq, dk, dv = _split(dqkv, n_heads)
    for_keys, for_queries = (each(q.device, **launch_shape(q, k)) for each in (_KEYS, _QUERIES))
    rotary_attention_triton_bwd_q_kernel[(triton.cdiv(seq, for_queries.rows), batch * heads)](
        q_rot, k_rot, v, cos, sin, out, dout, lse, delta, dq, *v.stride()[:3], seq,
        BLOCK_M=for_queries.rows, BLOCK_N=for_queries.cols, **kernel_constants(q, k, for_queries),
    )  # fmt: skip
    rotary_attention_triton_bwd_kv_kernel[(triton.cdiv(seq, for_keys.rows), batch * k.shape[2])](
        q_rot, k_rot, v, cos, sin, dout, lse, delta, dk, dv, *v.stride()[:3], seq,
        BLOCK_M=for_keys.cols, BLOCK_N=for_keys.rows, **kernel_constants(q, k, for_keys),
    )  # fmt: skip
    return (dqkv,)


def _fake_backward(
    dout: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int,
    out: Tensor, lse: Tensor, q_rot: Tensor, k_rot: Tensor,
) -> tuple[Tensor]:  # fmt: skip
    return (qkv.new_empty(qkv.shape),)


_operator = make_operator(
    "llmmed::rotary_attention_triton",
    forward=_forward,
    fake_forward=_fake_forward,
    backward=_backward,
    fake_backward=_fake_backward,
    save=lambda arguments, results: (*arguments, *results),
    gradients=("qkv",),
)


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> Tensor:
    """See `reference.rotary_attention`. Batch times heads may be 65,535, and positions lie within 2^31 elements of a
    sequence's first; raises `ValueError` beyond."""
    if qkv.shape[0] * n_heads > MOST_SEQUENCES:
        raise ValueError(f"rotary_attention (triton): batch times heads is over {MOST_SEQUENCES}")
    if is_long(qkv):
        raise ValueError("rotary_attention (triton): a sequence spans 2^31 elements of the projection")
    result: Tensor = _operator(qkv, cos, sin, n_heads)
    return result


def _load_impl() -> Callable[..., Any]:
    require_triton()
    return rotary_attention


IMPL = Implementation(
    "triton",
    load=_load_impl,
    devices=TRITON_DEVICES,
    kernel_names=(
        "rotary_attention_triton_fwd_kernel",
        "rotary_attention_triton_bwd_q_kernel",
        "rotary_attention_triton_bwd_kv_kernel",
        "rotary_attention_hopper_fwd_kernel",
        "rotary_attention_hopper_bwd_q_kernel",
        "rotary_attention_hopper_bwd_kv_kernel",
    ),
    tunable=(_FORWARD_PASS, _BACKWARD_PASS, _FORWARD, _KEYS, _QUERIES),
)
