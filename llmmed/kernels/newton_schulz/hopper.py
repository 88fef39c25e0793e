"""The symmetric product of `newton_schulz` for Hopper, in Gluon, where each warp has a task of its own.

A program stays on its multiprocessor and takes one tile of the lower triangle after the other. One warp asks for what
is multiplied, as far ahead as shared memory holds, and two groups of four warps multiply, each at half of a tile's
rows. Between them lies a ring of buffers, each with a barrier that says full and one that says empty; a barrier's phase
is how often the ring has gone around. An addend goes through the same ring, behind the last step of the sum.

What a group has computed stays in registers, rounded, until the next tile's sum is under way: it is then stored a part
a step, as it is and mirrored, while the tensor cores are busy.

Needs 16 bits, and matrices of whole tiles with a sum that is long enough (`takes`).
"""

# Annotations are arguments' kinds, for the compiler. So no `from __future__` here.
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llmmed.kernels.hopper import RESOURCES, add_step, barriers, described, end_sum
from llmmed.kernels.operator import gpu_of

BLOCK = 128  # rows of a tile; it has twice as many columns, or as many where a row of tiles would cross the diagonal
_DEPTH = 64  # of the sum, a step
_PART = 64  # rows that a group multiplies, and sides of what is stored at a time
_LATE_PARTS = 6  # of the eight that a group stores of a tile: they are stored beside the next tile's sum
_STAGES = 4  # steps that shared memory holds

_M: gl.constexpr = gl.constexpr(BLOCK)
_K: gl.constexpr = gl.constexpr(_DEPTH)
_P: gl.constexpr = gl.constexpr(_PART)
_LATE: gl.constexpr = gl.constexpr(_LATE_PARTS)


def takes(size: int, inner: int) -> bool:
    """Whether matrices [size, inner] are of whole tiles, with a step of the sum for each part that is stored late."""
    return size % BLOCK == 0 and inner % _DEPTH == 0 and inner >= _LATE_PARTS * _DEPTH


@gluon.jit
def _turns(n, size):
    """How many tiles this program takes."""
    total, programs = n * _tiles(size), gl.num_programs(0)
    whole = total // programs
    return whole + ((gl.program_id(0) + whole) % programs < total % programs).to(gl.int32)


@gluon.jit
def _tiles(size):
    """Of one matrix: half as many in a row as it has blocks up to the diagonal, rounded up."""
    blocks = size // _M
    return (blocks - blocks // 2) * (blocks // 2 + 1)


@gluon.jit
def _tile_of(turn, size):
    """A matrix' first row in the stack, where a tile begins in the matrix, and whether it has 256 columns.

    One matrix after the other. Among its wide tiles, row by row, the narrow ones lie evenly; and a program moves on by
    one from turn to turn, or it might meet none but wide ones.
    """
    index = turn * gl.num_programs(0) + (gl.program_id(0) + turn) % gl.num_programs(0)
    tile, half = index % _tiles(size), size // _M // 2
    narrow = tile // (half + 1)
    across = tile % (half + 1)
    wide = across < half
    # Rows 2 p - 1 and 2 p have p wide tiles each. The root is rounded: one correction either way makes it exact.
    rest = narrow * half + across
    p = ((gl.sqrt(4.0 * rest + 1.0) + 1.0) * 0.5).to(gl.int32)
    p = gl.where(p * (p - 1) > rest, p - 1, p)
    p = gl.where(p * (p + 1) <= rest, p + 1, p)
    rest -= p * (p - 1)
    row = gl.where(wide, 2 * p - 1 + rest // p, 2 * narrow)
    col = gl.where(wide, rest % p * 2, 2 * narrow)
    return index // _tiles(size) * size, row * _M, col * _M, wide


@gluon.jit
def _fetch(
    left_desc, right_desc, add_desc, left_tiles, right_tiles, full, empty, n, size, inner, STAGES: gl.constexpr
):  # fmt: skip
    step = 0
    for turn in range(_turns(n, size)):
        first, row, col, wide = _tile_of(turn, size)
        for start in range(0, inner, _K):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            bar, right = full.index(slot), right_tiles.index(slot)
            mbarrier.expect(bar, 3 * _M * _K * 2, pred=wide)
            mbarrier.expect(bar, 2 * _M * _K * 2, pred=~wide)
            tma.async_copy_global_to_shared(left_desc, [first + row, start], bar, left_tiles.index(slot))
            tma.async_copy_global_to_shared(right_desc, [first + col, start], bar, right.slice(0, _M, dim=0))
            tma.async_copy_global_to_shared(
                right_desc, [first + col + _M, start], bar, right.slice(_M, _M, dim=0), pred=wide
            )
            step += 1
        if add_desc is not None:
            for half in range(1 + wide.to(gl.int32)):
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
                bar, add, left = full.index(slot), right_tiles.index(slot), col + half * _M
                mbarrier.expect(bar, 2 * _M * _K * 2)
                tma.async_copy_global_to_shared(add_desc, [first + row, left], bar, add.slice(0, _M, dim=0))
                tma.async_copy_global_to_shared(add_desc, [first + row, left + _P], bar, add.slice(_M, _M, dim=0))
                step += 1


@gluon.jit
def _send_part(part, out_desc, outgoing, first, row, col, count, PART: gl.constexpr, WHICH: gl.constexpr):
    """Stores one of the `count` quarters of a group's rows, by way of a buffer: as it is, and in the next part mirrored
    unless its block lies on the diagonal."""
    top, left = row + WHICH * _P, col + PART // 2 * _P
    if PART % 2 == 0:
        if count > PART // 2:
            buffer = outgoing.index(0)
            tma.store_wait(0)
            buffer.store(part)
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [first + top, left], buffer)
    else:
        if (count > PART // 2) & (left // _M * _M != row):
            buffer = outgoing.index(1)
            tma.store_wait(1)  # all but the one right before, from the other buffer
            buffer.permute((1, 0)).store(part)
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [first + left, top], buffer)


@gluon.jit
def _rounded(sums, add_tile, row, col, alpha, beta, diagonal, like, ADD: gl.constexpr):
    """A quarter of a group's result, which begins at `row` and `col` of the matrix."""
    layout: gl.constexpr = like.type.layout
    value = alpha * gl.convert_layout(sums, layout, assert_trivial=True)
    if ADD:
        value += beta * add_tile.load(layout).to(gl.float32)
    if row == col:
        rows = gl.arange(0, _P, gl.SliceLayout(1, layout))
        cols = gl.arange(0, _P, gl.SliceLayout(0, layout))
        value += gl.where(rows[:, None] == cols[None, :], diagonal, 0.0)
    return value.to(like.dtype)


@gluon.jit
def _finished(
    sums, right_tiles, full, empty, step, row, col, alpha, beta, diagonal, like,
    ADD: gl.constexpr, STAGES: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Two quarters of a group's result."""
    # Columns that lie 64 or 128 apart are in the same thread: nothing moves.
    left, right = sums.reshape((_P, 2, _P)).permute((0, 2, 1)).split()
    slot = step % STAGES
    add = right_tiles.index(slot)
    if ADD:
        mbarrier.wait(full.index(slot), step // STAGES & 1)
    top = row + WHICH * _P
    first = _rounded(left, add.slice(WHICH * _P, _P, dim=0), top, col, alpha, beta, diagonal, like, ADD)
    second = _rounded(right, add.slice(_M + WHICH * _P, _P, dim=0), top, col + _P, alpha, beta, diagonal, like, ADD)
    if ADD:
        fence_async_shared()
        mbarrier.arrive(empty.index(slot))
    return first, second


@gluon.jit
def _multiply_tile(
    two, three, four, before, out_desc, left_tiles, right_tiles, outgoing, full, empty, step, first, row, col, inner,
    alpha, beta, diagonal, WIDTH: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """A group's rows of one tile, in quarters of 64 columns, while those of the tile before are stored."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    acc = gl.zeros((_P, WIDTH), gl.float32, layout)
    for late in gl.static_range(_LATE):
        acc = add_step(acc, left_tiles, right_tiles, full, empty, step, late > 0, _P, WIDTH, STAGES, WHICH)
        quarter = (two, three, four)[late // 2]
        _send_part(quarter, out_desc, outgoing, before[0], before[1], before[2], before[3], 2 + late, WHICH)
        step += 1
    for _ in range(_LATE * _K, inner, _K):
        acc = add_step(acc, left_tiles, right_tiles, full, empty, step, True, _P, WIDTH, STAGES, WHICH)
        step += 1
    acc = end_sum(acc, empty, step, STAGES)

    if WIDTH == _M:
        one, two = _finished(
            acc, right_tiles, full, empty, step, row, col, alpha, beta, diagonal, two, ADD, STAGES, WHICH
        )
        step += ADD
    else:
        left, right = acc.reshape((_P, 2, _M)).permute((0, 2, 1)).split()
        one, two = _finished(
            left, right_tiles, full, empty, step, row, col, alpha, beta, diagonal, two, ADD, STAGES, WHICH
        )
        step += ADD
        three, four = _finished(
            right, right_tiles, full, empty, step, row, col + _M, alpha, beta, diagonal, two, ADD, STAGES, WHICH
        )
        step += ADD
    for part in gl.static_range(2):  # at once: there are no registers to keep it
        _send_part(one, out_desc, outgoing, first, row, col, 1, part, WHICH)
    return two, three, four, step


@gluon.jit
def _multiply_tiles(
    out_desc, left_tiles, right_tiles, outgoing, full, empty, n, size, inner, alpha, beta, diagonal,
    STAGES: gl.constexpr, ADD: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _P, 16])
    two = gl.zeros((_P, _P), out_desc.dtype, layout)
    three, four = two, two
    first_before, row_before, col_before, count = 0, 0, 0, 0  # nothing is left to be stored yet
    step = 0
    for turn in range(_turns(n, size)):
        first, row, col, wide = _tile_of(turn, size)
        before = (first_before, row_before, col_before, count)
        if wide:
            two, three, four, step = _multiply_tile(
                two, three, four, before, out_desc, left_tiles, right_tiles, outgoing, full, empty, step,
                first, row, col, inner, alpha, beta, diagonal, 2 * _M, STAGES, ADD, WHICH,
            )  # fmt: skip
        else:
            two, three, four, step = _multiply_tile(
                two, three, four, before, out_desc, left_tiles, right_tiles, outgoing, full, empty, step,
                first, row, col, inner, alpha, beta, diagonal, _M, STAGES, ADD, WHICH,
            )  # fmt: skip
        first_before, row_before, col_before, count = first, row, col, 2 + 2 * wide.to(gl.int32)
    for late in gl.static_range(_LATE):
        quarter = (two, three, four)[late // 2]
        _send_part(quarter, out_desc, outgoing, first_before, row_before, col_before, count, 2 + late, WHICH)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n"])
def newton_schulz_hopper_fwd_kernel(
    left_desc, right_desc, add_desc, out_desc, n, size, inner, alpha, beta, diagonal, STAGES: gl.constexpr
):  # fmt: skip
    left_tiles = gl.allocate_shared_memory(left_desc.dtype, [STAGES, _M, _K], left_desc.layout)
    right_tiles = gl.allocate_shared_memory(right_desc.dtype, [STAGES, 2 * _M, _K], right_desc.layout)
    upper = gl.allocate_shared_memory(out_desc.dtype, [2, _P, _P], out_desc.layout)
    lower = gl.allocate_shared_memory(out_desc.dtype, [2, _P, _P], out_desc.layout)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)  # both groups have read a buffer before it is free
    fence_async_shared()
    gl.warp_specialize([
        (_multiply_tiles, (out_desc, left_tiles, right_tiles, upper, full, empty, n, size, inner,
                           alpha, beta, diagonal, STAGES, add_desc is not None, 0)),
        (_multiply_tiles, (out_desc, left_tiles, right_tiles, lower, full, empty, n, size, inner,
                           alpha, beta, diagonal, STAGES, add_desc is not None, 1)),
        (_fetch, (left_desc, right_desc, add_desc, left_tiles, right_tiles, full, empty, n, size, inner, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


def _stacked(tensor: Tensor, *block: int) -> TensorDescriptor:
    """All matrices one above the other, of which tiles never cross an edge."""
    return described(tensor.flatten(0, 1), *block)


def programs(out: Tensor) -> int:
    """One a multiprocessor, whose shared memory it fills, or one a tile."""
    n, size, _ = out.shape
    blocks = size // BLOCK
    tiles = (blocks // 2 + blocks % 2) * (blocks // 2 + 1)
    return min(n * tiles, gpu_of(out.device).multiprocessors)


def symmetric_product(
    left: Tensor, right: Tensor, add: Tensor | None, out: Tensor, alpha: float, beta: float, diagonal: float
) -> None:
    """Writes alpha left right^T + beta add + diagonal I to `out` [n, size, size], given [n, size, inner]."""
    n, size, inner = left.shape
    newton_schulz_hopper_fwd_kernel[(programs(out),)](
        _stacked(left, BLOCK, _DEPTH), _stacked(right, BLOCK, _DEPTH),
        None if add is None else _stacked(add, BLOCK, _DEPTH), _stacked(out, _PART, _PART),
        n, size, inner, alpha, beta, diagonal, STAGES=_STAGES, **RESOURCES,
    )  # fmt: skip
