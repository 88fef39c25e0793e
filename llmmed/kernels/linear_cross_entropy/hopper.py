"""The product of `linear_cross_entropy` that writes exponentials, for Hopper, in Gluon: each warp has its own task.

A program stays on its multiprocessor and takes one tile of 128 rows and 256 classes after the other. One warp asks for
tiles of what is multiplied, as far ahead as shared memory holds; two groups of four warps multiply, each 64 of a tile's
rows. Between them lies a ring of buffers, each with a barrier that says full and one that says empty; a barrier's phase
is how often the ring has gone around.

Of what a group has computed three quarters stay in registers, rounded, until the next tile's sum is under way: they are
then stored one a step, while the tensor cores are busy.
"""

# Annotations are arguments' kinds, for the compiler. So no `from __future__` here.
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from llmmed.kernels.hopper import RESOURCES, add_step, barriers, described, end_sum, rounded, send
from llmmed.kernels.operator import gpu_of

ROWS = 128  # of a tile
CLASSES = 256  # of a tile
_DEPTH = 64  # of the sum, a step
_PART = ROWS // 2  # rows that a group multiplies, and sides of what is stored at a time
_GROUP = 4  # tiles of classes that run beside each other
_STAGES = 4  # steps that shared memory holds
_LATE_PARTS = 3  # of four that a group stores of a tile: as many wait for the next tile's sum

_M: gl.constexpr = gl.constexpr(ROWS)
_N: gl.constexpr = gl.constexpr(CLASSES)
_K: gl.constexpr = gl.constexpr(_DEPTH)
_P: gl.constexpr = gl.constexpr(_PART)
_COLUMNS: gl.constexpr = gl.constexpr(_GROUP)
_LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)


@gluon.jit
def _tile_of(tile, n_rows, vocab):
    """Where a tile begins. Some columns of tiles at a time, row by row: the weight comes from memory once."""
    tiles_m = gl.cdiv(n_rows, _M)
    group = tile // (_COLUMNS * tiles_m)
    width = gl.minimum(gl.cdiv(vocab, _N) - group * _COLUMNS, _COLUMNS)
    in_group = tile % (_COLUMNS * tiles_m)
    return in_group // width * _M, (group * _COLUMNS + in_group % width) * _N


@gluon.jit
def _tiles(again_ptr, n_rows, vocab):
    tiles = gl.cdiv(n_rows, _M) * gl.cdiv(vocab, _N)
    if again_ptr is not None:
        tiles = gl.where(gl.load(again_ptr) != 0, tiles, 0)
    return tiles


@gluon.jit
def _is_wanted(again_ptr, row):
    """Whether a tile that begins at this row is computed."""
    if again_ptr is None:
        return True
    else:
        return gl.load(again_ptr + 1 + row // _M) != 0


@gluon.jit
def _fetch(
    x_desc, weight_desc, x_tiles, weight_tiles, full, empty, again_ptr, n_rows, vocab, width, STAGES: gl.constexpr
):  # fmt: skip
    step = 0
    for tile in range(gl.program_id(0), _tiles(again_ptr, n_rows, vocab), gl.num_programs(0)):
        row, col = _tile_of(tile, n_rows, vocab)
        if _is_wanted(again_ptr, row):
            for start in range(0, width, _K):
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
                bar = full.index(slot)
                mbarrier.expect(bar, (_M + _N) * _K * 2)
                tma.async_copy_global_to_shared(x_desc, [row, start], bar, x_tiles.index(slot))
                tma.async_copy_global_to_shared(weight_desc, [col, start], bar, weight_tiles.index(slot))
                step += 1


@gluon.jit
def _exponentials(logits, shift):
    """exp(logits - shift), no more than 2^100, given the shift in units of log 2; not a number where that is none."""
    exponents = gl.fma(logits, gl.full_like(logits, _LOG2_E), -shift)
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; min.NaN.f32 t, $1, 0f42C80000; ex2.approx.ftz.f32 $0, t; }",
        "=f,f", [exponents], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _exponentiate_tile(
    late, before, out_desc, x_tiles, weight_tiles, outgoing, full, empty, shifts_ptr, sums_ptr, maxima_ptr, step,
    row, col, n_rows, vocab, width, STAGES: gl.constexpr, LATE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """A group's rows of one tile, while what is left of the tile before is stored."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _N, 16])
    top = row + WHICH * _P
    rows = top + gl.arange(0, _P, gl.SliceLayout(1, layout))
    shift = gl.load(shifts_ptr + rows, mask=rows < n_rows, other=0.0) * _LOG2_E
    acc = gl.zeros((_P, _N), gl.float32, layout)
    for i in gl.static_range(LATE):
        acc = add_step(acc, x_tiles, weight_tiles, full, empty, step, i > 0, _P, _N, STAGES, WHICH)
        if before[0]:
            send(late[i], out_desc, before[1], before[2] + (4 - LATE + i) * _P, outgoing, 4 - LATE + i)
        step += 1
    for start in range(LATE * _K, width, _K):
        acc = add_step(acc, x_tiles, weight_tiles, full, empty, step, start > 0, _P, _N, STAGES, WHICH)
        step += 1
    acc = end_sum(acc, empty, step, STAGES)

    if col + _N > vocab:
        cols = col + gl.arange(0, _N, gl.SliceLayout(0, layout))
        acc = gl.where(cols[None, :] < vocab, acc, float("-inf"))
    at = col // _N * n_rows + rows
    gl.store(maxima_ptr + at, gl.max(acc, axis=1), mask=rows < n_rows)
    acc = _exponentials(acc, shift[:, None])
    gl.store(sums_ptr + at, gl.sum(acc, axis=1), mask=rows < n_rows)
    if out_desc is None:
        return late, step
    else:
        # Columns that lie 64 or 128 apart are in the same thread: nothing moves.
        like: gl.constexpr = late[0].type.layout
        left, right = rounded(acc, out_desc.dtype).reshape((_P, 2, _N // 2)).permute((0, 2, 1)).split()
        first, second = left.reshape((_P, 2, _P)).permute((0, 2, 1)).split()
        third, fourth = right.reshape((_P, 2, _P)).permute((0, 2, 1)).split()
        parts = (first, second, third, fourth)
        for i in gl.static_range(4 - LATE):
            send(parts[i], out_desc, top, col + i * _P, outgoing, i)
        second = gl.convert_layout(second, like, assert_trivial=True)
        third = gl.convert_layout(third, like, assert_trivial=True)
        fourth = gl.convert_layout(fourth, like, assert_trivial=True)
        return (second, third, fourth), step


@gluon.jit
def _exponentiate_tiles(
    out_desc, x_tiles, weight_tiles, outgoing, full, empty, shifts_ptr, sums_ptr, maxima_ptr, again_ptr,
    n_rows, vocab, width, STAGES: gl.constexpr, LATE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _P, 16])
    empty_part = gl.zeros((_P, _P), x_tiles.dtype, layout)
    late = (empty_part, empty_part, empty_part)
    some, top, left = False, 0, 0  # whether anything is left to be stored, and where
    step = 0
    for tile in range(gl.program_id(0), _tiles(again_ptr, n_rows, vocab), gl.num_programs(0)):
        row, col = _tile_of(tile, n_rows, vocab)
        if _is_wanted(again_ptr, row):
            late, step = _exponentiate_tile(
                late, (some, top, left), out_desc, x_tiles, weight_tiles, outgoing, full, empty, shifts_ptr, sums_ptr,
                maxima_ptr, step, row, col, n_rows, vocab, width, STAGES, LATE, WHICH,
            )  # fmt: skip
            some, top, left = True, row + WHICH * _P, col
    for i in gl.static_range(LATE):
        if some:
            send(late[i], out_desc, top, left + (4 - LATE + i) * _P, outgoing, 4 - LATE + i)
    tma.store_wait(0)


# Compiled for any sizes and addresses: compiling takes seconds, and nothing here would be faster for knowing them.
@gluon.jit(
    do_not_specialize=["n_rows", "vocab", "width"],
    do_not_specialize_on_alignment=["shifts_ptr", "sums_ptr", "maxima_ptr", "again_ptr"],
)
def linear_cross_entropy_hopper_fwd_kernel(
    x_desc, weight_desc, out_desc, shifts_ptr, sums_ptr, maxima_ptr, again_ptr, n_rows, vocab, width,
    STAGES: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES, _M, _K], x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, _N, _K], weight_desc.layout)
    if out_desc is not None:
        upper = gl.allocate_shared_memory(out_desc.dtype, [2, _P, _P], out_desc.layout)
        lower = gl.allocate_shared_memory(out_desc.dtype, [2, _P, _P], out_desc.layout)
    else:
        upper = x_tiles
        lower = x_tiles
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)  # both groups have read a buffer before it is free
    fence_async_shared()
    gl.warp_specialize([
        (_exponentiate_tiles, (out_desc, x_tiles, weight_tiles, upper, full, empty, shifts_ptr, sums_ptr,
                               maxima_ptr, again_ptr, n_rows, vocab, width, STAGES, LATE, 0)),
        (_exponentiate_tiles, (out_desc, x_tiles, weight_tiles, lower, full, empty, shifts_ptr, sums_ptr,
                               maxima_ptr, again_ptr, n_rows, vocab, width, STAGES, LATE, 1)),
        (_fetch, (x_desc, weight_desc, x_tiles, weight_tiles, full, empty, again_ptr, n_rows, vocab, width, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


def programs(x: Tensor, vocab: int) -> int:
    """One a multiprocessor, whose shared memory it fills, or one a tile."""
    return min(-(-x.shape[0] // ROWS) * -(-vocab // CLASSES), gpu_of(x.device).multiprocessors)


def exponentiate(
    x: Tensor, weight: Tensor, shifts: Tensor, out: Tensor | None, sums: Tensor, maxima: Tensor, again: Tensor | None
) -> None:
    """Takes exponentials of logits x weight^T, each no more than 2^100.

    Args:
        x: [rows, width] in bfloat16, whose range the exponentials need. weight: [vocab, width], likewise.
        shifts: [rows] float32, what is subtracted of a row's logits first.
        out: [rows, vocab] the exponentials, rounded; None if only the sums are wanted. Rows of this and of the factors
            begin a multiple of 16 bytes apart.
        sums: [tiles of classes, rows] float32, of exponentials that are not rounded.
        maxima: The same, of logits.
        again: int32, all of which is zero where nothing is to be done: [0] whether anything is, then for each block of
            rows whether that is. None for everything.
    """
    (n_rows, width), vocab = x.shape, weight.shape[0]
    late = _LATE_PARTS if out is not None and width > (_LATE_PARTS - 1) * _DEPTH else 0
    linear_cross_entropy_hopper_fwd_kernel[(programs(x, vocab),)](
        described(x, ROWS, _DEPTH), described(weight, CLASSES, _DEPTH),
        None if out is None else described(out, _PART, _PART), shifts, sums, maxima, again, n_rows, vocab, width,
        STAGES=_STAGES, LATE=late, **RESOURCES,
    )  # fmt: skip
