"""What the kernels of `rotary_attention` for Hopper share. In Gluon, where each warp has a task of its own.

A program stays on its multiprocessor and takes one pair of blocks of 128 positions after the other: under a causal mask
a long block and the short one at the other end of the sequence have as much to do as any other pair. One warp asks for
tiles, as far ahead as shared memory holds; two groups of four warps have 64 rows of the block each. Rings of buffers
lie between them, each buffer with a barrier that says full and one that says empty; a barrier's phase is how often its
ring has gone around. Where shared memory has room, what a block begins with comes while the block before is computed,
and what that has stored leaves while the next one is under way.

`hopper_forward.py` and `hopper_backward.py` have the kernels. No sums are split between programs: the same bits in
every run. All need 16 bits, heads of 64 or 128, sequences of whole blocks, and a contiguous projection (`suits`) that
begins at a multiple of 16 bytes, as the gradient that arrives must.
"""

# Annotations are arguments' kinds, for the compiler. So no `from __future__` here.
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llmmed.kernels.hopper import described
from llmmed.kernels.operator import gpu_of

BLOCK = 128  # queries or keys of a block, half of them for each group of warps
HALF = BLOCK // 2
LOG2_E = 1.4426950408889634

_B: gl.constexpr = gl.constexpr(BLOCK)
_H: gl.constexpr = gl.constexpr(HALF)


@gluon.jit
def between(pair, seq):
    """How far it is from the first block of a pair to the last, or past it where a block is its own pair."""
    return gl.maximum(seq // _B - 1 - 2 * pair, 1)


@gluon.jit
def place(turn, which, BUFFERS: gl.constexpr):
    """Which buffer holds a group's tile of its block number `turn`, of BUFFERS for each of the two groups, and the
    phase of its barriers."""
    return turn % BUFFERS * 2 + which, turn // BUFFERS & 1


@gluon.jit
def place_before(slot):
    """Of two buffers the one that held the tile of the block before, given where this block's is."""
    return slot ^ 2


@gluon.jit
def fetch_for_queries(
    q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    tasks, pairs, seq, HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    BUFFERS: gl.constexpr, dout_desc=None, out_desc=None, dout_tiles=None, out_tiles=None, out_full=None,
    out_empty=None,
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
        for block in range(pair, seq // _B - pair, between(pair, seq)):
            first = block * _B
            for which in gl.static_range(2):
                row = first + which * _H
                q_slot, q_phase = place(turn, which, BUFFERS)
                mbarrier.wait(q_empty.index(q_slot), q_phase ^ 1)
                bar = q_full.index(q_slot)
                at = batch * seq + row
                if dout_desc is None:  # forward: queries as the projection has them
                    mbarrier.expect(bar, _H * D * 2)
                    tma.async_copy_global_to_shared(q_desc, [at, head * D], bar, q_tiles.index(q_slot))
                else:
                    mbarrier.expect(bar, 2 * _H * D * 2)
                    tma.async_copy_global_to_shared(q_desc, [sequence * seq + row, 0], bar, q_tiles.index(q_slot))
                    tma.async_copy_global_to_shared(dout_desc, [at, head * D], bar, dout_tiles.index(q_slot))
                    out_slot, out_phase = place(turn, which, 2)
                    mbarrier.wait(out_empty.index(out_slot), out_phase ^ 1)
                    bar = out_full.index(out_slot)
                    mbarrier.expect(bar, _H * D * 2)
                    tma.async_copy_global_to_shared(out_desc, [at, head * D], bar, out_tiles.index(out_slot))
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
def halves(heads, D: gl.constexpr):
    """Of each head. They lie in the same threads: nothing moves."""
    return heads.reshape((_H, 2, D // 2)).permute((0, 2, 1)).split()


@gluon.jit
def rotation(position, cos_ptr, sin_ptr, heads_layout: gl.constexpr, D: gl.constexpr):
    """Cosines and sines of 64 positions from `position` on, [64, head_dim / 2], as half of a head lies in a thread."""
    half, _ = halves(gl.zeros((_H, D), gl.float32, heads_layout), D)
    layout: gl.constexpr = half.type.layout
    positions = position + gl.arange(0, _H, gl.SliceLayout(1, layout))
    table = positions[:, None] * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(0, layout))[None, :]
    return gl.load(cos_ptr + table), gl.load(sin_ptr + table)


def suits(qkv: Tensor) -> bool:
    """Whether these kernels take a projection [batch, seq, heads, head_dim]."""
    _, seq, _, head_dim = qkv.shape
    whole = qkv.numel() > 0 and seq % BLOCK == 0 and head_dim in (64, 128)
    return whole and qkv.element_size() == 2 and qkv.is_contiguous()


def by_position(x: Tensor, rows: int, cols: int | None = None) -> TensorDescriptor:
    """Of [batch, seq, heads, head_dim], contiguous, as a matrix with a row a position; tiles of one head or less."""
    return described(x.view(x.shape[0] * x.shape[1], -1), rows, cols or x.shape[-1])


def by_head(x: Tensor, rows: int) -> TensorDescriptor:
    """Of [batch, heads, seq, head_dim], contiguous, as a matrix with a row a position of a head."""
    return described(x.view(-1, x.shape[-1]), rows, x.shape[-1])


def programs(device: torch.device, tasks: int) -> int:
    """One a multiprocessor, whose shared memory it fills, or one a pair of blocks."""
    return min(tasks, gpu_of(device).multiprocessors)


def pairs_of(seq: int) -> int:
    return (seq // BLOCK + 1) // 2
