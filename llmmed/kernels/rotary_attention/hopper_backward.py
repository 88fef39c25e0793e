"""The backward kernels of `rotary_attention` for Hopper; `hopper.py` says how their warps work together.

* For the gradient of queries, blocks of 64 keys and values come by, those on the diagonal first.
* For those of keys and values, blocks of 64 queries and arriving gradients come by, with the statistics of their rows.
  Scores have keys as rows here, so that nothing has to be transposed to be a factor of the next product.

What is a factor goes from registers into the next product; gradients of queries and keys are turned back before they
leave, by way of tiles that have been read.
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

from llmmed.kernels.hopper import RESOURCES, barriers, described
from llmmed.kernels.rotary_attention.hopper import (
    BLOCK,
    HALF,
    LOG2_E,
    between,
    by_head,
    by_position,
    fetch_for_queries,
    fetch_head,
    halves,
    pairs_of,
    place,
    place_before,
    programs,
    rotation,
    store_head,
)

_B: gl.constexpr = gl.constexpr(BLOCK)
_H: gl.constexpr = gl.constexpr(HALF)
_LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.jit
def _turned_back(gradient, cos, sin, D: gl.constexpr):
    """Both halves of the gradient of 64 heads at consecutive positions, given that of what they were rotated to."""
    first, second = halves(gradient, D)
    return first * cos + second * sin, second * cos - first * sin


@gluon.jit
def _send(first, second, desc, row, head, tile, D: gl.constexpr):
    """Stores both halves of a head at 64 positions by way of a tile whose content has been read."""
    layout: gl.constexpr = gl.NVMMASharedLayout(D, 16, rank=2)  # of halves, a row's bytes being D
    buffer = tile._reinterpret(desc.dtype, [2, _H, D // 2], layout)
    upper, lower = buffer.index(0), buffer.index(1)
    upper.store(first.to(desc.dtype))
    lower.store(second.to(desc.dtype))
    fence_async_shared()
    if len(desc.block_type.shape) == 3:
        store_head(desc, row, head, tile, D)
    else:
        tma.async_copy_shared_to_global(desc, [row, head * D], upper)
        tma.async_copy_shared_to_global(desc, [row, head * D + D // 2], lower)


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
    HEADS: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    SCALE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _H, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    factor_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)
    TABLES_FIRST: gl.constexpr = D == 64  # then nothing waits for them, and registers hold them through all loops
    rows = gl.arange(0, _H, gl.SliceLayout(1, layout))
    cols = gl.arange(0, _H, gl.SliceLayout(0, layout))
    step = 0
    turn = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        pair, sequence = task % pairs, task // pairs
        for block in range(pair, seq // _B - pair, between(pair, seq)):
            first = block * _B
            statistics = sequence * seq + first + WHICH * _H + rows
            lse = gl.load(lse_ptr + statistics)
            if TABLES_FIRST:
                cos, sin = rotation(first + WHICH * _H, cos_ptr, sin_ptr, dq_layout, D, HEAD_DIM)
            q_slot, q_phase = place(turn, WHICH, BUFFERS)
            out_slot, out_phase = place(turn, WHICH, 2)
            q, dout, out = q_tiles.index(q_slot), dout_tiles.index(q_slot), out_tiles.index(out_slot)
            mbarrier.wait(q_full.index(q_slot), q_phase)
            mbarrier.wait(out_full.index(out_slot), out_phase)
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
            tma.store_wait(0)  # the gradient of the block before has left
            mbarrier.arrive(out_empty.index(place_before(out_slot)), pred=turn > 0)
            for _ in range(0, first // _H + WHICH):
                sums, factor = _query_step(sums, factor, q, dout, lse, delta, k_tiles, v_tiles, k_full, k_empty,
                                           v_full, v_empty, step, rows, cols, STAGES, SCALE, False,
                                           factor_layout)  # fmt: skip
                step += 1
            acc, factor = warpgroup_mma_wait(0, deps=(sums, factor))
            mbarrier.arrive(k_empty.index((step + STAGES - 1) % STAGES))
            mbarrier.arrive(q_empty.index(q_slot))
            turn += 1

            if not TABLES_FIRST:
                cos, sin = rotation(first + WHICH * _H, cos_ptr, sin_ptr, dq_layout, D, HEAD_DIM)
            # SCALE carries log2(e) for exp2; the gradient of the scores does not.
            first_half, second_half = _turned_back(acc * (SCALE * _LN_2), cos, sin, D)
            at = sequence // HEADS * seq + first + WHICH * _H
            # By way of the output, which was read in the beginning.
            _send(first_half, second_half, dqkv_desc, at, sequence % HEADS, out, D)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tasks", "pairs"])
def rotary_attention_hopper_bwd_q_kernel(
    q_desc, k_desc, v_desc, dout_desc, out_desc, dqkv_desc, cos_ptr, sin_ptr, lse_ptr, delta_ptr, tasks, pairs, seq,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    BUFFERS: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2 * BUFFERS, _H, D], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(q_desc.dtype, [2 * BUFFERS, _H, D], q_desc.layout)
    out_tiles = gl.allocate_shared_memory(q_desc.dtype, [4, _H, D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _H, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _H, D], q_desc.layout)
    q_full, q_empty = barriers(2 * BUFFERS, 1), barriers(2 * BUFFERS, 1)
    out_full, out_empty = barriers(4, 1), barriers(4, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize([
        (_differentiate_queries, (dqkv_desc, cos_ptr, sin_ptr, lse_ptr, delta_ptr, q_tiles, k_tiles, v_tiles,
                                  dout_tiles, out_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, out_full,
                                  out_empty, tasks, pairs, seq, HEADS, D, HEAD_DIM, STAGES, BUFFERS, SCALE, 0)),
        (_differentiate_queries, (dqkv_desc, cos_ptr, sin_ptr, lse_ptr, delta_ptr, q_tiles, k_tiles, v_tiles,
                                  dout_tiles, out_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, out_full,
                                  out_empty, tasks, pairs, seq, HEADS, D, HEAD_DIM, STAGES, BUFFERS, SCALE, 1)),
        (fetch_for_queries, (q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty,
                       v_full, v_empty, tasks, pairs, seq, HEADS, GROUP, D, _H, STAGES, BUFFERS,
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
        for block in range(pair, seq // _B - pair, between(pair, seq)):
            first = block * _B
            for which in gl.static_range(2):
                row = first + which * _H
                slot, phase = place(turn, which, 2)
                mbarrier.wait(kv_empty.index(slot), phase ^ 1)
                bar = kv_full.index(slot)
                mbarrier.expect(bar, 2 * _H * D * 2)
                tma.async_copy_global_to_shared(k_desc, [kv_sequence * seq + row, 0], bar, k_tiles.index(slot))
                fetch_head(v_desc, batch * seq + row, HEADS + KV_HEADS + kv_head, bar, v_tiles.index(slot), D)
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
                    fetch_head(dout_desc, at, head, bar, dout_tiles.index(slot), D)
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
    dk, dv, ds_factor, p_factor, k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles, full, empty, turn, step,
    STAGES: gl.constexpr, SCALE: gl.constexpr, WHICH: gl.constexpr, MASKED: gl.constexpr, factor_layout: gl.constexpr,
):  # fmt: skip
    """One block of queries: adds its part to both gradients, of which the block before may still be on its way."""
    slot = step % STAGES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _H, 16])
    along: gl.constexpr = gl.SliceLayout(0, layout)
    across: gl.constexpr = gl.SliceLayout(1, layout)
    q, dout = q_tiles.index(slot), dout_tiles.index(slot)
    kv_slot, _ = place(_opaque(turn), WHICH, 2)
    k, v = k_tiles.index(kv_slot), v_tiles.index(kv_slot)
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
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    SCALE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    KV_HEADS: gl.constexpr = HEADS // GROUP
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    factor_layout: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    TABLES_FIRST: gl.constexpr = D == 64  # then nothing waits for them, and registers hold them through all loops
    step = 0
    turn = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        pair, kv_sequence = task % pairs, task // pairs
        batch, kv_head = kv_sequence // KV_HEADS, kv_sequence % KV_HEADS
        for block in range(pair, seq // _B - pair, between(pair, seq)):
            first = block * _B
            if TABLES_FIRST:
                cos, sin = rotation(first + WHICH * _H, cos_ptr, sin_ptr, dk_layout, D, HEAD_DIM)
            kv_slot, kv_phase = place(turn, WHICH, 2)
            mbarrier.wait(kv_full.index(kv_slot), kv_phase)
            dk_sum = gl.zeros((_H, D), gl.float32, dk_layout)
            dv_sum = gl.zeros((_H, D), gl.float32, dk_layout)
            for member in range(0, GROUP):
                if WHICH == 1:  # the upper queries see none of the lower keys
                    slot = step % STAGES
                    mbarrier.wait(full.index(slot), step // STAGES & 1)
                    mbarrier.arrive(empty.index(slot))
                    step += 1
                dk, dv = warpgroup_mma_init(dk_sum), warpgroup_mma_init(dv_sum)
                ds = gl.zeros((_H, _H), q_tiles.dtype, factor_layout)
                p = ds
                dk, dv, ds, p = _key_step(
                    dk, dv, ds, p, k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles, full, empty,
                    turn, step, STAGES, SCALE, WHICH, True, factor_layout,
                )  # fmt: skip
                step += 1
                tma.store_wait(0)  # the gradients of the block before have left
                mbarrier.arrive(kv_empty.index(place_before(kv_slot)), pred=(turn > 0) & (member == 0))
                for _ in range(0, (seq - first) // _H - WHICH - 1):
                    dk, dv, ds, p = _key_step(
                        dk, dv, ds, p, k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles, full, empty,
                        turn, step, STAGES, SCALE, WHICH, False, factor_layout,
                    )  # fmt: skip
                    step += 1
                dk_sum, dv_sum, ds, p = warpgroup_mma_wait(0, deps=(dk, dv, ds, p))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
            turn += 1

            at, head = batch * seq + first + WHICH * _H, HEADS + kv_head
            first_half, second_half = halves(dv_sum, D)
            _send(first_half, second_half, dqkv_desc, at, head + KV_HEADS, v_tiles.index(kv_slot), D)
            if not TABLES_FIRST:
                cos, sin = rotation(first + WHICH * _H, cos_ptr, sin_ptr, dk_layout, D, HEAD_DIM)
            first_half, second_half = _turned_back(dk_sum * (SCALE * _LN_2), cos, sin, D)
            _send(first_half, second_half, dqkv_desc, at, head, k_tiles.index(kv_slot), D)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tasks", "pairs"])
def rotary_attention_hopper_bwd_kv_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, dqkv_desc, cos_ptr, sin_ptr, tasks, pairs, seq,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    SCALE: gl.constexpr,
):  # fmt: skip
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [4, _H, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [4, _H, D], q_desc.layout)
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _H, D], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, _H, D], q_desc.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, _H], lse_desc.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, _H], delta_desc.layout)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    kv_full, kv_empty = barriers(4, 1), barriers(4, 1)
    fence_async_shared()
    gl.warp_specialize([
        (_differentiate_keys, (dqkv_desc, cos_ptr, sin_ptr, q_tiles, k_tiles, v_tiles, dout_tiles,
                               lse_tiles, delta_tiles, full, empty, kv_full, kv_empty, tasks, pairs, seq,
                               HEADS, GROUP, D, HEAD_DIM, STAGES, SCALE, 0)),
        (_differentiate_keys, (dqkv_desc, cos_ptr, sin_ptr, q_tiles, k_tiles, v_tiles, dout_tiles,
                               lse_tiles, delta_tiles, full, empty, kv_full, kv_empty, tasks, pairs, seq,
                               HEADS, GROUP, D, HEAD_DIM, STAGES, SCALE, 1)),
        (_fetch_for_keys, (q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, q_tiles, k_tiles, v_tiles,
                          dout_tiles, lse_tiles, delta_tiles, full, empty, kv_full, kv_empty, tasks, pairs, seq,
                          HEADS, GROUP, D, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


def differentiate(
    dout: Tensor, q_rot: Tensor, k_rot: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor,
    dqkv: Tensor,
) -> None:  # fmt: skip
    """Writes the gradient of the projection, given that of the output, contiguous as all of them."""
    batch, heads, seq, width = q_rot.shape
    head_dim, kv_heads, pairs = qkv.shape[-1], k_rot.shape[1], pairs_of(seq)
    wide = width == 128  # fewer tiles fill the shared memory
    delta = torch.empty_like(lse)
    rotated = (by_head(x, HALF, head_dim) for x in (q_rot, k_rot))
    read = (*rotated, by_position(qkv, HALF, width), by_position(dout, HALF, width))
    written = by_position(dqkv, HALF, width, width // 2)
    constants = {
        "HEADS": heads, "GROUP": heads // kv_heads, "D": width, "HEAD_DIM": head_dim, "SCALE": head_dim**-0.5 * LOG2_E
    }  # fmt: skip
    rotary_attention_hopper_bwd_q_kernel[(programs(qkv.device, pairs * batch * heads),)](
        *read, by_position(out, HALF, width), written, cos, sin, lse, delta, pairs * batch * heads, pairs, seq,
        STAGES=3 if wide else 8, BUFFERS=1 if wide else 2, **constants, **RESOURCES,
    )  # fmt: skip
    rotary_attention_hopper_bwd_kv_kernel[(programs(qkv.device, pairs * batch * kv_heads),)](
        *read, described(lse.view(-1), HALF), described(delta.view(-1), HALF), written, cos, sin,
        pairs * batch * kv_heads, pairs, seq, STAGES=3 if wide else 8, **constants, **RESOURCES,
    )  # fmt: skip
