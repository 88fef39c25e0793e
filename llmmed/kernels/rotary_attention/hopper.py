"""What the kernels of `rotary_attention` for Hopper share. In Gluon, where each warp has a task of its own.

A program stays on its multiprocessor and takes one pair of blocks of 128 positions after the other: under a causal mask
a long block and the short one at the other end of the sequence have as much to do as any other pair. One warp asks for
tiles, as far ahead as shared memory holds; two groups of four warps have 64 rows of the block each. Rings of buffers
lie between them, each buffer with a barrier that says full and one that says empty; a barrier's phase is how often its
ring has gone around. Where shared memory has room, what a block begins with comes while the block before is computed,
and what that has stored leaves while the next one is under way.

`hopper_forward.py` and `hopper_backward.py` have the kernels. No sums are split between programs: the same bits in
every run. All need 16 bits, sequences of whole blocks, heads of 33 to 128 whose halves begin at multiples of 16 bytes,
and a contiguous projection (`suits`) that begins at one, as the gradient that arrives must.

Tiles are as wide as 64 or 128. Narrower heads lie in them as rotated ones do in memory: each half followed by zeros,
which the hardware fills in when it copies halves, and leaves out when it writes them (`by_position`).
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
def fetch_head(desc, row, head, bar, tile, D: gl.constexpr):
    """Asks for a head at consecutive positions, of what `by_position` describes."""
    if len(desc.block_type.shape) == 3:
        halves_of_tile = tile._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
        tma.async_copy_global_to_shared(desc, [2 * head, row, 0], bar, halves_of_tile)
    else:
        tma.async_copy_global_to_shared(desc, [row, head * D], bar, tile)


@gluon.jit
def store_head(desc, row, head, tile, D: gl.constexpr):
    """Stores a head at consecutive positions to what `by_position` describes."""
    if len(desc.block_type.shape) == 3:
        halves_of_tile = tile._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
        tma.async_copy_shared_to_global(desc, [2 * head, row, 0], halves_of_tile)
    else:
        tma.async_copy_shared_to_global(desc, [row, head * D], tile)


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
                    fetch_head(q_desc, at, head, bar, q_tiles.index(q_slot), D)
                else:
                    mbarrier.expect(bar, 2 * _H * D * 2)
                    tma.async_copy_global_to_shared(q_desc, [sequence * seq + row, 0], bar, q_tiles.index(q_slot))
                    fetch_head(dout_desc, at, head, bar, dout_tiles.index(q_slot), D)
                    out_slot, out_phase = place(turn, which, 2)
                    mbarrier.wait(out_empty.index(out_slot), out_phase ^ 1)
                    bar = out_full.index(out_slot)
                    mbarrier.expect(bar, _H * D * 2)
                    fetch_head(out_desc, at, head, bar, out_tiles.index(out_slot), D)
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
                fetch_head(v_desc, batch * seq + start, HEADS + KV_HEADS + kv_head, bar, v_tiles.index(slot), D)
                step += 1


@gluon.jit
def halves(heads, D: gl.constexpr):
    """Of each head. They lie in the same threads: nothing moves."""
    return heads.reshape((_H, 2, D // 2)).permute((0, 2, 1)).split()


@gluon.jit
def rotation(position, cos_ptr, sin_ptr, heads_layout: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Cosines and sines of 64 positions from `position` on, as half of a tile lies in a thread, [64, D / 2]. Past a
    head's half there are zeros to rotate, by anything finite."""
    half, _ = halves(gl.zeros((_H, D), gl.float32, heads_layout), D)
    layout: gl.constexpr = half.type.layout
    positions = position + gl.arange(0, _H, gl.SliceLayout(1, layout))
    cols = gl.arange(0, D // 2, gl.SliceLayout(0, layout))
    if HEAD_DIM < D:
        cols = gl.minimum(cols, HEAD_DIM // 2 - 1)
    table = positions[:, None] * (HEAD_DIM // 2) + cols[None, :]
    return gl.load(cos_ptr + table), gl.load(sin_ptr + table)


def suits(qkv: Tensor) -> bool:
    """Whether these kernels take a projection [batch, seq, heads, head_dim]."""
    _, seq, _, head_dim = qkv.shape
    whole = qkv.numel() > 0 and seq % BLOCK == 0 and 32 < head_dim <= 128 and head_dim % 16 == 0
    return whole and qkv.element_size() == 2 and qkv.is_contiguous()


def by_position(x: Tensor, rows: int, width: int, cols: int | None = None) -> TensorDescriptor:
    """Of [batch, seq, heads, head_dim], contiguous, for tiles of one head, or of `cols` columns of it.

    A matrix with a row a position, where a head is as wide as its tile. Otherwise [heads and halves, positions,
    head_dim / 2], of which a tile takes two halves, one after the other and both too wide.
    """
    positions, head_dim = x.shape[0] * x.shape[1], x.shape[-1]
    if head_dim == width:
        return described(x.view(positions, -1), rows, cols or width)
    split = x.view(positions, -1, head_dim // 2).transpose(0, 1)
    return described(split, 2, rows, width // 2, swizzle=width)


def by_head(x: Tensor, rows: int, head_dim: int) -> TensorDescriptor:
    """Of rotated heads [batch, heads, seq, width], contiguous, as a matrix with a row a position of a head."""
    width = x.shape[-1]
    # Where a head's halves are copied one by one, so many bytes have to be a tile's unit everywhere.
    return described(x.view(-1, width), rows, width, swizzle=None if head_dim == width else width)


def programs(device: torch.device, tasks: int) -> int:
    """One a multiprocessor, whose shared memory it fills, or one a pair of blocks."""
    return min(tasks, gpu_of(device).multiprocessors)


def pairs_of(seq: int) -> int:
    return (seq // BLOCK + 1) // 2
