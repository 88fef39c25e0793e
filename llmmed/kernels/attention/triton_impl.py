"""`attention` in Triton: FlashAttention-2 (Dao 2023), causal, grouped queries, forward and backward without atomics.

Backward recomputes the scores twice, once for the keys' and values' gradients and once for the queries': two products
more than with atomic additions, and the same bits in every run.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.operator import TRITON_DEVICES, make_operator, require_triton, shared_bytes
from llmmed.kernels.tunable import Tunable

_LOG2_E = 1.4426950408889634
MOST_SEQUENCES = 65535  # CUDA's limit for the second axis of a grid


class Launch(NamedTuple):
    """Block sizes and resources of one kernel. `rows` are the queries or keys that a program owns, a
    multiple of `cols`: blocks beside the diagonal then need no mask."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int


@triton.jit
def _wide(stride, LONG: tl.constexpr):
    """A stride in 64 bits where positions times it do not fit into 32, which cost registers."""
    if LONG:
        return stride + tl.full((), 0, tl.int64)
    else:
        return stride


@triton.jit
def _load(ptr, rows, stride, cols, seq, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr):
    """A [rows, head_dim] tile; rows past the end and padding of the head read as zero."""
    pointers = ptr + rows[:, None] * stride + cols[None, :]
    if EVEN and cols.shape[0] == HEAD_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows < seq)[:, None] & (cols < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store(ptr, values, rows, stride, cols, seq, HEAD_DIM: tl.constexpr):
    mask = (rows < seq)[:, None] & (cols < HEAD_DIM)[None, :]
    tl.store(ptr + rows[:, None] * stride + cols[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    acc, total, peak, q, k_ptr, v_ptr, k_stride, v_stride, rows, lo, hi, seq, scale,
    ROW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # ROW is what a row of keys has in memory: HEAD_DIM, or BLOCK_D where the padding is there, too.
    dims = tl.arange(0, BLOCK_D)
    for start in tl.range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, cols, k_stride, dims, seq, ROW, EVEN or not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            scores = tl.where(rows[:, None] >= cols[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(p, axis=1)
        v = _load(v_ptr, cols, v_stride, dims, seq, HEAD_DIM, EVEN or not MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit
def attention_triton_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, seq,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    q_seq, k_seq, v_seq = _wide(q_seq, LONG), _wide(k_seq, LONG), _wide(v_seq, LONG)
    # The longest rows of blocks first, so that the last programs to start are the short ones.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + (head // GROUP) * k_head
    v_ptr += batch * v_batch + (head // GROUP) * v_head
    rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q = _load(q_ptr, rows, q_seq, dims, seq, HEAD_DIM, EVEN)

    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    diagonal = block * BLOCK_M
    acc, total, peak = _attend(acc, total, peak, q, k_ptr, v_ptr, k_seq, v_seq, rows, 0, diagonal, seq, SCALE,
                               HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, False, EVEN, PRECISION)  # fmt: skip
    acc, total, peak = _attend(acc, total, peak, q, k_ptr, v_ptr, k_seq, v_seq, rows, diagonal,
                               tl.minimum(diagonal + BLOCK_M, seq), seq, SCALE,
                               HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, True, EVEN, PRECISION)  # fmt: skip
    out_ptr += (batch * seq * HEADS + head) * HEAD_DIM
    _store(out_ptr, acc / total[:, None], rows, _wide(HEADS * HEAD_DIM, LONG), dims, seq, HEAD_DIM)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * seq + rows, peak + tl.log2(total), mask=rows < seq)


@triton.jit
def attention_triton_bwd_delta_kernel(
    out_ptr, dout_ptr, delta_ptr, d_batch, d_seq, d_head, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    rows, dims = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    out_ptr += (batch * seq * HEADS + head) * HEAD_DIM
    out = _load(out_ptr, rows, _wide(HEADS * HEAD_DIM, LONG), dims, seq, HEAD_DIM, False).to(tl.float32)
    d_seq = _wide(d_seq, LONG)
    dout = _load(dout_ptr + batch * d_batch + head * d_head, rows, d_seq, dims, seq, HEAD_DIM, False).to(tl.float32)
    tl.store(delta_ptr + tl.program_id(1).to(tl.int64) * seq + rows, tl.sum(out * dout, axis=1), mask=rows < seq)


@triton.jit
def _key_gradients(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_stride, d_stride, cols, lo, hi, seq, scale,
    ROW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    for start in tl.range(lo, hi, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = _load(q_ptr, rows, q_stride, dims, seq, ROW, EVEN)
        lse = tl.load(lse_ptr + rows, mask=rows < seq, other=float("inf"))
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])  # [keys, queries]
        if MASKED:
            p = tl.where(rows[None, :] >= cols[:, None], p, 0.0)
        dout = _load(dout_ptr, rows, d_stride, dims, seq, HEAD_DIM, EVEN)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        delta = tl.load(delta_ptr + rows, mask=rows < seq, other=0.0)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attention_triton_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, d_batch, d_seq, d_head, seq,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    KV_HEADS: tl.constexpr = HEADS // GROUP
    q_seq, k_seq, v_seq, d_seq = _wide(q_seq, LONG), _wide(k_seq, LONG), _wide(v_seq, LONG), _wide(d_seq, LONG)
    batch, kv_head = (tl.program_id(1) // KV_HEADS).to(tl.int64), (tl.program_id(1) % KV_HEADS).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    cols, dims = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k = _load(k_ptr + batch * k_batch + kv_head * k_head, cols, k_seq, dims, seq, HEAD_DIM, EVEN)
    v = _load(v_ptr + batch * v_batch + kv_head * v_head, cols, v_seq, dims, seq, HEAD_DIM, EVEN)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head_ptr = q_ptr + batch * q_batch + head * q_head
        d_head_ptr = dout_ptr + batch * d_batch + head * d_head
        statistics = (batch * HEADS + head) * seq
        # Blocks on the diagonal are masked; BLOCK_M divides BLOCK_N, so the rest need no mask.
        dk, dv = _key_gradients(dk, dv, k, v, q_head_ptr, d_head_ptr, lse_ptr + statistics, delta_ptr + statistics,
                                q_seq, d_seq, cols, first, tl.minimum(first + BLOCK_N, seq), seq, SCALE,
                                HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_M, True, EVEN, PRECISION)  # fmt: skip
        dk, dv = _key_gradients(dk, dv, k, v, q_head_ptr, d_head_ptr, lse_ptr + statistics, delta_ptr + statistics,
                                q_seq, d_seq, cols, first + BLOCK_N, seq, seq, SCALE,
                                HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_M, False, EVEN, PRECISION)  # fmt: skip
    out = (batch * seq * KV_HEADS + kv_head) * HEAD_DIM
    # SCALE carries log2(e) for exp2; the gradient of the scores does not.
    stride = _wide(KV_HEADS * HEAD_DIM, LONG)
    _store(dk_ptr + out, dk * (SCALE * 0.6931471805599453), cols, stride, dims, seq, HEAD_DIM)
    _store(dv_ptr + out, dv, cols, stride, dims, seq, HEAD_DIM)


@triton.jit
def _query_gradient(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, rows, lo, hi, seq, scale,
    ROW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    for start in tl.range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, cols, k_stride, dims, seq, ROW, EVEN or not MASKED)
        v = _load(v_ptr, cols, v_stride, dims, seq, HEAD_DIM, EVEN or not MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
        if MASKED:
            p = tl.where(rows[:, None] >= cols[None, :], p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_triton_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, d_batch, d_seq, d_head, seq,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    q_seq, k_seq, v_seq, d_seq = _wide(q_seq, LONG), _wide(k_seq, LONG), _wide(v_seq, LONG), _wide(d_seq, LONG)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    k_ptr += batch * k_batch + (head // GROUP) * k_head
    v_ptr += batch * v_batch + (head // GROUP) * v_head
    rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q = _load(q_ptr + batch * q_batch + head * q_head, rows, q_seq, dims, seq, HEAD_DIM, EVEN)
    dout = _load(dout_ptr + batch * d_batch + head * d_head, rows, d_seq, dims, seq, HEAD_DIM, EVEN)
    statistics = tl.program_id(1).to(tl.int64) * seq + rows
    lse = tl.load(lse_ptr + statistics, mask=rows < seq, other=float("inf"))
    delta = tl.load(delta_ptr + statistics, mask=rows < seq, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    diagonal = block * BLOCK_M
    dq = _query_gradient(dq, q, dout, lse, delta, k_ptr, v_ptr, k_seq, v_seq, rows, 0, diagonal, seq, SCALE,
                         HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, False, EVEN, PRECISION)  # fmt: skip
    dq = _query_gradient(dq, q, dout, lse, delta, k_ptr, v_ptr, k_seq, v_seq, rows, diagonal,
                         tl.minimum(diagonal + BLOCK_M, seq), seq, SCALE,
                         HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, True, EVEN, PRECISION)  # fmt: skip
    dq_ptr += (batch * seq * HEADS + head) * HEAD_DIM
    _store(dq_ptr, dq * (SCALE * 0.6931471805599453), rows, _wide(HEADS * HEAD_DIM, LONG), dims, seq, HEAD_DIM)


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


_FORWARD = tunable("attention_triton_fwd_kernel", 0)
_KEYS = tunable("attention_triton_bwd_kv_kernel", 1)
_QUERIES = tunable("attention_triton_bwd_q_kernel", 2)


def _shape(q: Tensor, k: Tensor) -> dict[str, int]:
    """What launches depend on. On the length and on the group only once a search has been made."""
    _, seq, heads, head_dim = q.shape
    return {"head_dim": head_dim, "itemsize": q.element_size(), "seq": seq, "group": heads // k.shape[2]}


def _constants(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> dict[str, Any]:
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
        "PRECISION": "tf32" if q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "LONG": _is_long(q, k, v),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def _is_long(*tensors: Tensor) -> bool:
    """Whether some position lies 2^31 elements or more from the first, here or in a dense result of the same shape."""
    return any(x.shape[1] * max(x.stride(1), x.shape[2] * x.shape[3]) >= 2**31 for x in tensors)


def _unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = _unit_stride(q, k, v)
    batch, seq, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seq), dtype=torch.float32, device=q.device)  # in powers of two
    launch = _FORWARD(q.device, **_shape(q, k))
    attention_triton_fwd_kernel[(triton.cdiv(seq, launch.rows), batch * heads)](
        q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], seq,
        BLOCK_M=launch.rows, BLOCK_N=launch.cols, **_constants(q, k, v, launch),
    )  # fmt: skip
    return out, lse


def _fake_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, seq, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seq), dtype=torch.float32)


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _unit_stride(q, k, v)
    dout = dout.contiguous()  # as a step hands it over; other strides would be other kernels, each compiled for seconds
    batch, seq, heads, head_dim = q.shape
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for_keys, for_queries = (each(q.device, **_shape(q, k)) for each in (_KEYS, _QUERIES))
    strides = [stride for x in (q, k, v, dout) for stride in x.stride()[:3]]
    constants = _constants(q, k, v, for_keys)
    attention_triton_bwd_delta_kernel[(triton.cdiv(seq, 64), batch * heads)](
        out, dout, delta, *dout.stride()[:3], seq,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=constants["BLOCK_D"], BLOCK_M=64, LONG=constants["LONG"],
    )  # fmt: skip
    attention_triton_bwd_kv_kernel[(triton.cdiv(seq, for_keys.rows), batch * k.shape[2])](
        q, k, v, dout, lse, delta, dk, dv, *strides, seq, BLOCK_M=for_keys.cols, BLOCK_N=for_keys.rows, **constants
    )
    attention_triton_bwd_q_kernel[(triton.cdiv(seq, for_queries.rows), batch * heads)](
        q, k, v, dout, lse, delta, dq, *strides, seq,
        BLOCK_M=for_queries.rows, BLOCK_N=for_queries.cols, **_constants(q, k, v, for_queries),
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
