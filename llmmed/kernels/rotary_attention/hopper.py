"""The kernels of `rotary_attention` for Hopper, in Gluon, where each warp has a task of its own.

A program stays on its multiprocessor and takes one pair of blocks of 128 positions after the other: under a causal mask
a long block and the short one at the other end of the sequence have as much to do as any other pair. One warp asks for
tiles, as far ahead as shared memory holds; two groups of four warps have 64 rows of the block each. Rings of buffers
lie between them, each buffer with a barrier that says full and one that says empty; a barrier's phase is how often its
ring has gone around.

* Forward, a group rotates its queries and keeps them for backward. Blocks of 128 keys and values come by, those on the
  diagonal first. Their scores are computed while the values of the block before are added up.
* For the gradient of queries, blocks of 64 keys and values come by in the same order.
* For those of keys and values, blocks of 64 queries and arriving gradients come by, with the statistics of their rows.
  Scores have keys as rows here, so that nothing has to be transposed to be a factor of the next product.

What is a factor goes from registers into the next product; gradients of queries and keys are turned back before they
leave. No sums are split between programs: the same bits in every run.

All need 16 bits, heads of 64 or 128, sequences of whole blocks, and a contiguous projection (`suits`) that begins at a
multiple of 16 bytes, as the gradient that arrives must.
"""

# Annotations are arguments' kinds, for the compiler. So no `from __future__` here.
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llmmed.kernels.hopper import RESOURCES, barriers, described
from llmmed.kernels.operator import gpu_of

BLOCK = 128  # queries or keys of a block, half of them for each group of warps
_HALF = BLOCK // 2
_LOG2_E = 1.4426950408889634

_B: gl.constexpr = gl.constexpr(BLOCK)
_H: gl.constexpr = gl.constexpr(_HALF)
_LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.jit
def _other(pair, seq):
    """How far it is from the first block of a pair to the last, or past it where a block is its own pair."""
    return gl.maximum(seq // _B - 1 - 2 * pair, 1)


@gluon.jit
def _fetch_for_queries(
    q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    tasks, pairs, seq, HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    dout_desc=None, out_desc=None, dout_tiles=None, out_tiles=None, out_full=None, out_empty=None,
):  # fmt: skip
    """Of each block its queries, and the keys and values up to its diagonal, N at a time, last ones first. For backward
    also the output and its gradient."""
    KV_HEADS: gl.constexpr = HEADS // GROUP
    step = 0
    turn = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        pair, sequence = task % pairs, task // pairs
        batch, head = sequence // HEADS, sequence % HEADS
        kv_head = head // GROUP
        for block in range(pair, seq // _B - pair, _other(pair, seq)):
            first = block * _B
            for which in gl.static_range(2):
                row = first + which * _H
                mbarrier.wait(q_empty.index(which), (turn & 1) ^ 1)
                bar = q_full.index(which)
                at = batch * seq + row
                if dout_desc is None:  # forward: queries as the projection has them
                    mbarrier.expect(bar, _H * D * 2)
                    tma.async_copy_global_to_shared(q_desc, [at, head * D], bar, q_tiles.index(which))
                else:
                    mbarrier.expect(bar, 2 * _H * D * 2)
                    tma.async_copy_global_to_shared(q_desc, [sequence * seq + row, 0], bar, q_tiles.index(which))
                    tma.async_copy_global_to_shared(dout_desc, [at, head * D], bar, dout_tiles.index(which))
                    mbarrier.wait(out_empty.index(which), (turn & 1) ^ 1)
                    bar = out_full.index(which)
                    mbarrier.expect(bar, _H * D * 2)
                    tma.async_copy_global_to_shared(out_desc, [at, head * D], bar, out_tiles.index(which))
            turn += 1
            for i in range(0, (first + _B) // N):
                start = first + _B - N - i * N
                slot = step % STAGES
                phase = (step // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(slot), phase)
                bar = k_full.index(slot)
                mbarrier.expect(bar, N * D * 2)
                row = (batch * KV_HEADS + kv_head) * seq + start
                tma.async_copy_global_to_shared(k_desc, [row, 0], bar, k_tiles.index(slot))
                mbarrier.wait(v_empty.index(slot), phase)
                bar = v_full.index(slot)
                mbarrier.expect(bar, N * D * 2)
                col = (HEADS + KV_HEADS + kv_head) * D
                tma.async_copy_global_to_shared(v_desc, [batch * seq + start, col], bar, v_tiles.index(slot))
                step += 1


@gluon.jit
def _halves(heads, D: gl.constexpr):
    """Of each head. They lie in the same threads: nothing moves."""
    return heads.reshape((_H, 2, D // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _rotation(position, cos_ptr, sin_ptr, half, D: gl.constexpr):
    """Cosines and sines of 64 positions from `position` on, as half a head lies: [64, head_dim / 2]."""
    layout: gl.constexpr = half.type.layout
    positions = position + gl.arange(0, _H, gl.SliceLayout(1, layout))
    table = positions[:, None] * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(0, layout))[None, :]
    return gl.load(cos_ptr + table), gl.load(sin_ptr + table)


@gluon.jit
def _turned_back(gradient, position, cos_ptr, sin_ptr, D: gl.constexpr):
    """Both halves of the gradient of 64 heads at consecutive positions, given that of what they were rotated to."""
    first, second = _halves(gradient, D)
    cos, sin = _rotation(position, cos_ptr, sin_ptr, first, D)
    return first * cos + second * sin, second * cos - first * sin


@gluon.jit
def _attend(
    q_rot_desc, out_desc, cos_ptr, sin_ptr, lse_ptr, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty,
    k_full, k_empty, v_full, v_empty, tasks, pairs, seq,
    HEADS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SCALE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _B, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    factor_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    dtype: gl.constexpr = out_desc.dtype
    rows = WHICH * _H + gl.arange(0, _H, gl.SliceLayout(1, scores_layout))
    cols = gl.arange(0, _B, gl.SliceLayout(0, scores_layout))
    q = q_tiles.index(WHICH)
    step = 0
    turn = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        pair, sequence = task % pairs, task // pairs
        for block in range(pair, seq // _B - pair, _other(pair, seq)):
            row = block * _B + WHICH * _H
            mbarrier.wait(q_full.index(WHICH), turn & 1)
            first, second = _halves(q.load(out_layout).to(gl.float32), D)
            cos, sin = _rotation(row, cos_ptr, sin_ptr, first, D)
            rotated = gl.join(first * cos - second * sin, second * cos + first * sin)
            q.store(rotated.permute((0, 2, 1)).reshape((_H, D)).to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(q_rot_desc, [sequence * seq + row, 0], q)

            # On the diagonal, where every row has a key of its own: from here on its maximum is finite.
            slot = step % STAGES
            mbarrier.wait(k_full.index(slot), step // STAGES & 1)
            zeros = gl.zeros((_H, _B), gl.float32, scores_layout)
            scores = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(slot))
            scores = gl.where(rows[:, None] >= cols[None, :], scores, float("-inf"))
            peak = gl.max(scores, axis=1) * SCALE
            p = gl.exp2(scores * SCALE - peak[:, None])
            total = gl.sum(p, axis=1)
            factor = gl.convert_layout(p.to(dtype), factor_layout)
            acc = gl.zeros((_H, D), gl.float32, out_layout)
            for _ in range(0, block):
                after = step + 1
                after_slot = after % STAGES
                mbarrier.wait(k_full.index(after_slot), after // STAGES & 1)
                keys = k_tiles.index(after_slot).permute((1, 0))
                scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(slot), step // STAGES & 1)
                sums = warpgroup_mma(factor, v_tiles.index(slot), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores,))
                mbarrier.arrive(k_empty.index(after_slot))
                new_peak = gl.maximum(peak, gl.max(scores, axis=1) * SCALE)
                p = gl.exp2(scores * SCALE - new_peak[:, None])
                rescale = gl.exp2(peak - new_peak)
                total = total * rescale + gl.sum(p, axis=1)
                peak = new_peak
                acc, factor = warpgroup_mma_wait(0, deps=(sums, factor))
                mbarrier.arrive(v_empty.index(slot))
                acc *= gl.convert_layout(rescale, gl.SliceLayout(1, out_layout))[:, None]
                factor = gl.convert_layout(p.to(dtype), factor_layout)
                step = after
                slot = after_slot
            tma.store_wait(0)  # these queries and the output of the block before have left, long since
            mbarrier.arrive(q_empty.index(WHICH))
            mbarrier.wait(v_full.index(slot), step // STAGES & 1)
            sums = warpgroup_mma(factor, v_tiles.index(slot), acc, is_async=True)
            acc, factor = warpgroup_mma_wait(0, deps=(sums, factor))
            mbarrier.arrive(v_empty.index(slot))
            step += 1
            turn += 1

            gl.store(lse_ptr + sequence * seq + block * _B + rows, peak + gl.log2(total))
            acc *= gl.convert_layout(1.0 / total, gl.SliceLayout(1, out_layout))[:, None]
            buffer = out_tiles.index(WHICH)
            buffer.store(acc.to(dtype))
            fence_async_shared()
            at = sequence // HEADS * seq + row
            tma.async_copy_shared_to_global(out_desc, [at, sequence % HEADS * D], buffer)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tasks", "pairs"])
def rotary_attention_hopper_fwd_kernel(
    q_desc, k_desc, v_desc, q_rot_desc, out_desc, cos_ptr, sin_ptr, lse_ptr, tasks, pairs, seq,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, _H, D], q_desc.layout)
    out_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, _H, D], out_desc.layout)
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _B, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _B, D], v_desc.layout)
    q_full, q_empty = barriers(2, 1), barriers(2, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)  # both groups have read a buffer before it is free
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize([
        (_attend, (q_rot_desc, out_desc, cos_ptr, sin_ptr, lse_ptr, q_tiles, k_tiles, v_tiles, out_tiles,
                   q_full, q_empty, k_full, k_empty, v_full, v_empty, tasks, pairs, seq, HEADS, D, STAGES, SCALE, 0)),
        (_attend, (q_rot_desc, out_desc, cos_ptr, sin_ptr, lse_ptr, q_tiles, k_tiles, v_tiles, out_tiles,
                   q_full, q_empty, k_full, k_empty, v_full, v_empty, tasks, pairs, seq, HEADS, D, STAGES, SCALE, 1)),
        (_fetch_for_queries, (q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty,
                       v_full, v_empty, tasks, pairs, seq, HEADS, GROUP, D, _B, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _send(first, second, desc, row, col, tile, D: gl.constexpr):
    """Stores both halves of 64 heads by way of a tile whose content has been read."""
    buffer = tile._reinterpret(desc.dtype, [2, _H, D // 2], desc.layout)
    upper, lower = buffer.index(0), buffer.index(1)
    upper.store(first.to(desc.dtype))
    lower.store(second.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [row, col], upper)
    tma.async_copy_shared_to_global(desc, [row, col + D // 2], lower)


@gluon.jit
def _query_step(
    sums, factor, q, dout, lse, delta, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, step, rows, cols,
    STAGES: gl.constexpr, SCALE: gl.constexpr, MASKED: gl.constexpr, factor_layout: gl.constexpr,
):  # fmt: skip
    """One block of keys: adds its part to the queries' gradient, of which the block before may still be on its way."""
    slot = step % STAGES
    phase = step // STAGES & 1
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _H, 16])
    zeros = gl.zeros((_H, _H), gl.float32, layout)
    keys = k_tiles.index(slot)
    mbarrier.wait(k_full.index(slot), phase)
    scores = warpgroup_mma(q, keys.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot), phase)
    dp = warpgroup_mma(dout, v_tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores, acc, factor = warpgroup_mma_wait(1, deps=(scores, sums, factor))
    if not MASKED:  # at the diagonal there is no block before
        mbarrier.arrive(k_empty.index((step + STAGES - 1) % STAGES))
    p = gl.exp2(scores * SCALE - lse[:, None])
    if MASKED:
        p = gl.where(rows[:, None] >= cols[None, :], p, 0.0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    mbarrier.arrive(v_empty.index(slot))
    factor = gl.convert_layout((p * (dp - delta[:, None])).to(k_tiles.dtype), factor_layout)
    return warpgroup_mma(factor, keys, acc, is_async=True), factor


@gluon.jit
def _differentiate_queries(
    dqkv_desc, cos_ptr, sin_ptr, lse_ptr, delta_ptr, q_tiles, k_tiles, v_tiles, dout_tiles, out_tiles,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, out_full, out_empty, tasks, pairs, seq,
    HEADS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SCALE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _H, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    factor_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)
    rows = gl.arange(0, _H, gl.SliceLayout(1, layout))
    cols = gl.arange(0, _H, gl.SliceLayout(0, layout))
    q, dout, out = q_tiles.index(WHICH), dout_tiles.index(WHICH), out_tiles.index(WHICH)
    step = 0
    turn = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        pair, sequence = task % pairs, task // pairs
        for block in range(pair, seq // _B - pair, _other(pair, seq)):
            first = block * _B
            statistics = sequence * seq + first + WHICH * _H + rows
            lse = gl.load(lse_ptr + statistics)
            mbarrier.wait(q_full.index(WHICH), turn & 1)
            mbarrier.wait(out_full.index(WHICH), turn & 1)
            products = dout.load(dq_layout).to(gl.float32) * out.load(dq_layout).to(gl.float32)
            delta = gl.convert_layout(gl.sum(products, axis=1), gl.SliceLayout(1, layout))
            gl.store(delta_ptr + statistics, delta)  # for the keys' kernel, which comes next

            if WHICH == 0:  # what lies past the diagonal of the upper rows is the lower ones' alone
                slot = step % STAGES
                mbarrier.wait(k_full.index(slot), step // STAGES & 1)
                mbarrier.arrive(k_empty.index(slot))
                mbarrier.wait(v_full.index(slot), step // STAGES & 1)
                mbarrier.arrive(v_empty.index(slot))
                step += 1
            sums = warpgroup_mma_init(gl.zeros((_H, D), gl.float32, dq_layout))
            factor = gl.zeros((_H, _H), q_tiles.dtype, factor_layout)
            sums, factor = _query_step(sums, factor, q, dout, lse, delta, k_tiles, v_tiles, k_full, k_empty,
                                       v_full, v_empty, step, rows, cols, STAGES, SCALE, True,
                                       factor_layout)  # fmt: skip
            step += 1
            for _ in range(0, first // _H + WHICH):
                sums, factor = _query_step(sums, factor, q, dout, lse, delta, k_tiles, v_tiles, k_full, k_empty,
                                           v_full, v_empty, step, rows, cols, STAGES, SCALE, False,
                                           factor_layout)  # fmt: skip
                step += 1
            acc, factor = warpgroup_mma_wait(0, deps=(sums, factor))
            mbarrier.arrive(k_empty.index((step + STAGES - 1) % STAGES))
            mbarrier.arrive(q_empty.index(WHICH))
            turn += 1

            # SCALE carries log2(e) for exp2; the gradient of the scores does not.
            first_half, second_half = _turned_back(acc * (SCALE * _LN_2), first + WHICH * _H, cos_ptr, sin_ptr, D)
            at = sequence // HEADS * seq + first + WHICH * _H
            # By way of the output, which was read in the beginning.
            _send(first_half, second_half, dqkv_desc, at, sequence % HEADS * D, out, D)
            tma.store_wait(0)
            mbarrier.arrive(out_empty.index(WHICH))


@gluon.jit(do_not_specialize=["tasks", "pairs"])
def rotary_attention_hopper_bwd_q_kernel(
    q_desc, k_desc, v_desc, dout_desc, out_desc, dqkv_desc, cos_ptr, sin_ptr, lse_ptr, delta_ptr, tasks, pairs, seq,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, _H, D], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, _H, D], dout_desc.layout)
    out_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, _H, D], out_desc.layout)
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _H, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _H, D], v_desc.layout)
    q_full, q_empty, out_full, out_empty = barriers(2, 1), barriers(2, 1), barriers(2, 1), barriers(2, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize([
        (_differentiate_queries, (dqkv_desc, cos_ptr, sin_ptr, lse_ptr, delta_ptr, q_tiles, k_tiles, v_tiles,
                                  dout_tiles, out_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, out_full,
                                  out_empty, tasks, pairs, seq, HEADS, D, STAGES, SCALE, 0)),
        (_differentiate_queries, (dqkv_desc, cos_ptr, sin_ptr, lse_ptr, delta_ptr, q_tiles, k_tiles, v_tiles,
                                  dout_tiles, out_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, out_full,
                                  out_empty, tasks, pairs, seq, HEADS, D, STAGES, SCALE, 1)),
        (_fetch_for_queries, (q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty,
                       v_full, v_empty, tasks, pairs, seq, HEADS, GROUP, D, _H, STAGES,
                       dout_desc, out_desc, dout_tiles, out_tiles, out_full, out_empty)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _fetch_for_keys(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, q_tiles, k_tiles, v_tiles, dout_tiles, lse_tiles,
    delta_tiles, full, empty, kv_full, kv_empty, tasks, pairs, seq,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Of each block its keys and values, and for each head of their group the queries from the diagonal on."""
    KV_HEADS: gl.constexpr = HEADS // GROUP
    step = 0
    turn = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        pair, kv_sequence = task % pairs, task // pairs
        batch, kv_head = kv_sequence // KV_HEADS, kv_sequence % KV_HEADS
        for block in range(pair, seq // _B - pair, _other(pair, seq)):
            first = block * _B
            for which in gl.static_range(2):
                row = first + which * _H
                mbarrier.wait(kv_empty.index(which), (turn & 1) ^ 1)
                bar = kv_full.index(which)
                mbarrier.expect(bar, 2 * _H * D * 2)
                tma.async_copy_global_to_shared(k_desc, [kv_sequence * seq + row, 0], bar, k_tiles.index(which))
                col = (HEADS + KV_HEADS + kv_head) * D
                tma.async_copy_global_to_shared(v_desc, [batch * seq + row, col], bar, v_tiles.index(which))
            turn += 1
            for member in range(0, GROUP):
                head = kv_head * GROUP + member
                statistics = (batch * HEADS + head) * seq
                for start in range(first, seq, _H):
                    slot = step % STAGES
                    mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
                    bar = full.index(slot)
                    mbarrier.expect(bar, 2 * _H * D * 2 + 2 * _H * 4)
                    tma.async_copy_global_to_shared(q_desc, [statistics + start, 0], bar, q_tiles.index(slot))
                    at = batch * seq + start
                    tma.async_copy_global_to_shared(dout_desc, [at, head * D], bar, dout_tiles.index(slot))
                    tma.async_copy_global_to_shared(lse_desc, [statistics + start], bar, lse_tiles.index(slot))
                    tma.async_copy_global_to_shared(delta_desc, [statistics + start], bar, delta_tiles.index(slot))
                    step += 1


@gluon.jit
def _opaque(x):
    """The same, of which the compiler does not know it: what follows from it is computed where it is needed, instead of
    being held in registers through all loops."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _key_step(
    dk, dv, ds_factor, p_factor, k, v, q_tiles, dout_tiles, lse_tiles, delta_tiles, full, empty, step,
    STAGES: gl.constexpr, SCALE: gl.constexpr, MASKED: gl.constexpr, factor_layout: gl.constexpr,
):  # fmt: skip
    """One block of queries: adds its part to both gradients, of which the block before may still be on its way."""
    slot = step % STAGES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _H, 16])
    along: gl.constexpr = gl.SliceLayout(0, layout)
    across: gl.constexpr = gl.SliceLayout(1, layout)
    q, dout = q_tiles.index(slot), dout_tiles.index(slot)
    mbarrier.wait(full.index(slot), step // STAGES & 1)
    # Sums begin with what is taken off the scores and their gradients: no registers are left for it afterwards.
    lse = lse_tiles.index(slot).load(along) * (-1.0 / SCALE)
    scores = gl.zeros((_H, _H), gl.float32, layout) + lse[None, :]
    scores = warpgroup_mma(k, q.permute((1, 0)), scores, is_async=True)
    dk, dv, ds_factor, p_factor = warpgroup_mma_wait(1, deps=(dk, dv, ds_factor, p_factor))
    if not MASKED:
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    scores = warpgroup_mma_wait(0, deps=(scores,))
    p = gl.exp2(scores * SCALE)
    if MASKED:
        p = gl.where(_opaque(gl.arange(0, _H, along))[None, :] >= gl.arange(0, _H, across)[:, None], p, 0.0)
    dp = gl.zeros((_H, _H), gl.float32, layout) - delta_tiles.index(slot).load(along)[None, :]
    dp = warpgroup_mma(v, dout.permute((1, 0)), dp, is_async=True)
    p_factor = gl.convert_layout(p.to(q_tiles.dtype), factor_layout)
    dv = warpgroup_mma(p_factor, dout, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds_factor = gl.convert_layout((p * dp).to(q_tiles.dtype), factor_layout)
    dk = warpgroup_mma(ds_factor, q, dk, is_async=True)
    return dk, dv, ds_factor, p_factor


@gluon.jit
def _differentiate_keys(
    dqkv_desc, cos_ptr, sin_ptr, q_tiles, k_tiles, v_tiles, dout_tiles, lse_tiles,
    delta_tiles, full, empty, kv_full, kv_empty, tasks, pairs, seq,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SCALE: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    KV_HEADS: gl.constexpr = HEADS // GROUP
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    factor_layout: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    k, v = k_tiles.index(WHICH), v_tiles.index(WHICH)
    step = 0
    turn = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        pair, kv_sequence = task % pairs, task // pairs
        batch, kv_head = kv_sequence // KV_HEADS, kv_sequence % KV_HEADS
        for block in range(pair, seq // _B - pair, _other(pair, seq)):
            first = block * _B
            mbarrier.wait(kv_full.index(WHICH), turn & 1)
            dk_sum = gl.zeros((_H, D), gl.float32, dk_layout)
            dv_sum = gl.zeros((_H, D), gl.float32, dk_layout)
            for _ in range(0, GROUP):
                if WHICH == 1:  # the upper queries see none of the lower keys
                    slot = step % STAGES
                    mbarrier.wait(full.index(slot), step // STAGES & 1)
                    mbarrier.arrive(empty.index(slot))
                    step += 1
                dk, dv = warpgroup_mma_init(dk_sum), warpgroup_mma_init(dv_sum)
                ds = gl.zeros((_H, _H), q_tiles.dtype, factor_layout)
                p = ds
                dk, dv, ds, p = _key_step(
                    dk, dv, ds, p, k, v, q_tiles, dout_tiles, lse_tiles, delta_tiles, full, empty, step,
                    STAGES, SCALE, True, factor_layout,
                )  # fmt: skip
                step += 1
                for _ in range(0, (seq - first) // _H - WHICH - 1):
                    dk, dv, ds, p = _key_step(
                        dk, dv, ds, p, k, v, q_tiles, dout_tiles, lse_tiles, delta_tiles, full, empty, step,
                        STAGES, SCALE, False, factor_layout,
                    )  # fmt: skip
                    step += 1
                dk_sum, dv_sum, ds, p = warpgroup_mma_wait(0, deps=(dk, dv, ds, p))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
            turn += 1

            at, col = batch * seq + first + WHICH * _H, (HEADS + kv_head) * D
            first_half, second_half = _halves(dv_sum, D)
            _send(first_half, second_half, dqkv_desc, at, col + KV_HEADS * D, v, D)
            first_half, second_half = _turned_back(dk_sum * (SCALE * _LN_2), first + WHICH * _H, cos_ptr, sin_ptr, D)
            _send(first_half, second_half, dqkv_desc, at, col, k, D)
            tma.store_wait(0)
            mbarrier.arrive(kv_empty.index(WHICH))


@gluon.jit(do_not_specialize=["tasks", "pairs"])
def rotary_attention_hopper_bwd_kv_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, dqkv_desc, cos_ptr, sin_ptr, tasks, pairs, seq,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, _H, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, _H, D], v_desc.layout)
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _H, D], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _H, D], dout_desc.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, _H], lse_desc.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, _H], delta_desc.layout)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    kv_full, kv_empty = barriers(2, 1), barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize([
        (_differentiate_keys, (dqkv_desc, cos_ptr, sin_ptr, q_tiles, k_tiles, v_tiles, dout_tiles,
                               lse_tiles, delta_tiles, full, empty, kv_full, kv_empty, tasks, pairs, seq,
                               HEADS, GROUP, D, STAGES, SCALE, 0)),
        (_differentiate_keys, (dqkv_desc, cos_ptr, sin_ptr, q_tiles, k_tiles, v_tiles, dout_tiles,
                               lse_tiles, delta_tiles, full, empty, kv_full, kv_empty, tasks, pairs, seq,
                               HEADS, GROUP, D, STAGES, SCALE, 1)),
        (_fetch_for_keys, (q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, q_tiles, k_tiles, v_tiles,
                          dout_tiles, lse_tiles, delta_tiles, full, empty, kv_full, kv_empty, tasks, pairs, seq,
                          HEADS, GROUP, D, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


def suits(qkv: Tensor) -> bool:
    """Whether these kernels take a projection [batch, seq, heads, head_dim]."""
    _, seq, _, head_dim = qkv.shape
    whole = qkv.numel() > 0 and seq % BLOCK == 0 and head_dim in (64, 128)
    return whole and qkv.element_size() == 2 and qkv.is_contiguous()


def _by_position(x: Tensor, rows: int, cols: int | None = None) -> TensorDescriptor:
    """Of [batch, seq, heads, head_dim], contiguous, as a matrix with a row a position; tiles of one head or less."""
    return described(x.view(x.shape[0] * x.shape[1], -1), rows, cols or x.shape[-1])


def _by_head(x: Tensor, rows: int) -> TensorDescriptor:
    """Of [batch, heads, seq, head_dim], contiguous, as a matrix with a row a position of a head."""
    return described(x.view(-1, x.shape[-1]), rows, x.shape[-1])


def programs(device: torch.device, tasks: int) -> int:
    """One a multiprocessor, whose shared memory it fills, or one a pair of blocks."""
    return min(tasks, gpu_of(device).multiprocessors)


def _pairs(seq: int) -> int:
    return (seq // BLOCK + 1) // 2


def attend(qkv: Tensor, k_rot: Tensor, cos: Tensor, sin: Tensor, q_rot: Tensor, out: Tensor, lse: Tensor) -> None:
    """Writes rotated queries [batch, n_heads, seq, head_dim], the output [batch, seq, n_heads, head_dim] and its
    statistics [batch, n_heads, seq], given rotated keys."""
    batch, heads, seq, head_dim = q_rot.shape
    pairs = _pairs(seq)
    rotary_attention_hopper_fwd_kernel[(programs(qkv.device, pairs * batch * heads),)](
        _by_position(qkv, _HALF), _by_head(k_rot, BLOCK), _by_position(qkv, BLOCK), _by_head(q_rot, _HALF),
        _by_position(out, _HALF), cos, sin, lse, pairs * batch * heads, pairs, seq,
        HEADS=heads, GROUP=heads // k_rot.shape[1], D=head_dim, STAGES=2 if head_dim == 128 else 3,
        SCALE=head_dim**-0.5 * _LOG2_E, **RESOURCES,
    )  # fmt: skip


def differentiate(
    dout: Tensor, q_rot: Tensor, k_rot: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor,
    dqkv: Tensor,
) -> None:  # fmt: skip
    """Writes the gradient of the projection, given that of the output, contiguous as all of them."""
    batch, heads, seq, head_dim = q_rot.shape
    kv_heads, pairs = k_rot.shape[1], _pairs(seq)
    delta = torch.empty_like(lse)
    read = (_by_head(q_rot, _HALF), _by_head(k_rot, _HALF), _by_position(qkv, _HALF), _by_position(dout, _HALF))
    written = _by_position(dqkv, _HALF, head_dim // 2)
    constants = {"HEADS": heads, "GROUP": heads // kv_heads, "D": head_dim, "SCALE": head_dim**-0.5 * _LOG2_E}
    rotary_attention_hopper_bwd_q_kernel[(programs(qkv.device, pairs * batch * heads),)](
        *read, _by_position(out, _HALF), written, cos, sin, lse, delta, pairs * batch * heads, pairs, seq,
        STAGES=3, **constants, **RESOURCES,
    )  # fmt: skip
    rotary_attention_hopper_bwd_kv_kernel[(programs(qkv.device, pairs * batch * kv_heads),)](
        *read, described(lse.view(-1), _HALF), described(delta.view(-1), _HALF), written, cos, sin,
        pairs * batch * kv_heads, pairs, seq, STAGES=4, **constants, **RESOURCES,
    )  # fmt: skip
