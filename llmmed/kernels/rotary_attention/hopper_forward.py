"""The forward kernel of `rotary_attention` for Hopper; `hopper.py` says how its warps work together.

A group rotates its queries and keeps them for backward. Blocks of 128 keys and values come by, those on the diagonal
first. Their scores are computed while the values of the block before are added up.
"""

# Annotations are arguments' kinds, for the compiler. So no `from __future__` here.
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from llmmed.kernels.hopper import RESOURCES, barriers
from llmmed.kernels.rotary_attention.hopper import (
    BLOCK,
    HALF,
    LOG2_E,
    between,
    by_head,
    by_position,
    fetch_for_queries,
    halves,
    pairs_of,
    place,
    programs,
    rotation,
    store_head,
)

_B: gl.constexpr = gl.constexpr(BLOCK)
_H: gl.constexpr = gl.constexpr(HALF)


@gluon.jit
def _attend(
    q_rot_desc, out_desc, cos_ptr, sin_ptr, lse_ptr, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty,
    k_full, k_empty, v_full, v_empty, tasks, pairs, seq,
    HEADS: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, SCALE: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _B, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    factor_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    dtype: gl.constexpr = out_desc.dtype
    rows = WHICH * _H + gl.arange(0, _H, gl.SliceLayout(1, scores_layout))
    cols = gl.arange(0, _B, gl.SliceLayout(0, scores_layout))
    cos, sin = rotation(gl.program_id(0) % pairs * _B + WHICH * _H, cos_ptr, sin_ptr, out_layout, D, HEAD_DIM)
    step = 0
    turn = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        pair, sequence = task % pairs, task // pairs
        for block in range(pair, seq // _B - pair, between(pair, seq)):
            row = block * _B + WHICH * _H
            q_slot, q_phase = place(turn, WHICH, 2)
            q = q_tiles.index(q_slot)
            mbarrier.wait(q_full.index(q_slot), q_phase)
            first, second = halves(q.load(out_layout).to(gl.float32), D)
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
            mbarrier.arrive(q_empty.index(q_slot))
            # The next block's tables come meanwhile.
            partner = seq // _B - 1 - pair
            next_block = gl.where(block < partner, partner, (task + gl.num_programs(0)) % pairs)
            cos, sin = rotation(next_block * _B + WHICH * _H, cos_ptr, sin_ptr, out_layout, D, HEAD_DIM)
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
            store_head(out_desc, at, sequence % HEADS, buffer, D)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tasks", "pairs"])
def rotary_attention_hopper_fwd_kernel(
    q_desc, k_desc, v_desc, q_rot_desc, out_desc, cos_ptr, sin_ptr, lse_ptr, tasks, pairs, seq,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    SCALE: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [4, _H, D], q_rot_desc.layout)
    out_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, _H, D], q_rot_desc.layout)
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _B, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _B, D], k_desc.layout)
    q_full, q_empty = barriers(4, 1), barriers(4, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)  # both groups have read a buffer before it is free
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize([
        (_attend, (q_rot_desc, out_desc, cos_ptr, sin_ptr, lse_ptr, q_tiles, k_tiles, v_tiles, out_tiles,
                   q_full, q_empty, k_full, k_empty, v_full, v_empty, tasks, pairs, seq,
                   HEADS, D, HEAD_DIM, STAGES, SCALE, 0)),
        (_attend, (q_rot_desc, out_desc, cos_ptr, sin_ptr, lse_ptr, q_tiles, k_tiles, v_tiles, out_tiles,
                   q_full, q_empty, k_full, k_empty, v_full, v_empty, tasks, pairs, seq,
                   HEADS, D, HEAD_DIM, STAGES, SCALE, 1)),
        (fetch_for_queries, (q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty,
                       v_full, v_empty, tasks, pairs, seq, HEADS, GROUP, D, _B, STAGES, 2)),
    ], [4, 1], [240, 24])  # fmt: skip


def attend(qkv: Tensor, k_rot: Tensor, cos: Tensor, sin: Tensor, q_rot: Tensor, out: Tensor, lse: Tensor) -> None:
    """Writes rotated queries [batch, n_heads, seq, head_dim], the output [batch, seq, n_heads, head_dim] and its
    statistics [batch, n_heads, seq], given rotated keys."""
    batch, heads, seq, width = q_rot.shape
    head_dim, pairs = qkv.shape[-1], pairs_of(seq)
    rotary_attention_hopper_fwd_kernel[(programs(qkv.device, pairs * batch * heads),)](
        by_position(qkv, HALF, width), by_head(k_rot, BLOCK, head_dim), by_position(qkv, BLOCK, width),
        by_head(q_rot, HALF, head_dim), by_position(out, HALF, width), cos, sin, lse, pairs * batch * heads, pairs, seq,
        HEADS=heads, GROUP=heads // k_rot.shape[1], D=width, HEAD_DIM=head_dim, STAGES=2 if width == 128 else 4,
        SCALE=head_dim**-0.5 * LOG2_E, **RESOURCES,
    )  # fmt: skip
