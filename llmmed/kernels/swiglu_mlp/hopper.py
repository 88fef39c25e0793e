"""The two kernels of `swiglu_mlp` for Hopper, in Gluon, where each warp has a task of its own.

A program stays on its multiprocessor and takes one tile after the other. One warp asks for tiles of what is multiplied,
as far ahead as shared memory holds; two groups of four warps multiply. Rings of buffers lie between them, each buffer
with a barrier that says full and one that says empty; a barrier's phase is how often its ring has gone around.

* Forward, both groups work at the same tile of 128 rows and 128 hidden units, gate and up, each at half of its rows.
  Half of what a group has computed stays in registers, rounded, until the next tile's sum is under way, and is then
  stored one part a step, while the tensor cores are busy.
* Backward, each group has a tile of 128 x 128 of its own: while one multiplies, the other reads gate and up, which
  another warp has asked for in quarters of the tile, and writes both gradients over them, to be stored from there.
  Where forward has not kept the activation's result, it is written once more, over up, before up's gradient is.

Both need 16 bits, hidden units in whole blocks of 128, and rows that the hardware copies (`describable`).
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

from llmmed.kernels.hopper import RESOURCES, add_step, barriers, described, end_sum, rounded, send
from llmmed.kernels.operator import gpu_of

BLOCK = 128  # rows of a tile, and its hidden units
_DEPTH = 64  # of the sum, a step
_PART = BLOCK // 2  # rows that a group multiplies at a time, and sides of what is stored at a time
_GROUP = 8  # rows of tiles that run beside each other
_FORWARD_STAGES, _BACKWARD_STAGES = 4, 5  # steps that shared memory holds
_LATE_PARTS = 3  # of six that a group of the forward kernel stores of a tile: as many wait for the next tile's sum

_M: gl.constexpr = gl.constexpr(BLOCK)
_K: gl.constexpr = gl.constexpr(_DEPTH)
_P: gl.constexpr = gl.constexpr(_PART)
_GROUP_ROWS: gl.constexpr = gl.constexpr(_GROUP)


@gluon.jit
def _tile_of(tile, n_rows, d_ff):
    """Where a tile begins. Some rows of tiles at a time, column by column: what neighbouring programs read stays in
    the L2 cache."""
    tiles_n = d_ff // _M
    group = tile // (_GROUP_ROWS * tiles_n)
    height = gl.minimum(gl.cdiv(n_rows, _M) - group * _GROUP_ROWS, _GROUP_ROWS)
    in_group = tile % (_GROUP_ROWS * tiles_n)
    return (group * _GROUP_ROWS + in_group % height) * _M, in_group // height * _M


@gluon.jit
def _tiles(n_rows, d_ff):
    return gl.cdiv(n_rows, _M) * (d_ff // _M)


@gluon.jit
def _sigmoid(x):
    """By the hardware's approximations, which are off by one or two units in the last place of float32."""
    inverse = 1.0 + gl.exp2(x * -1.4426950408889634)
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [inverse], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _fetch_forward(x_desc, weight_desc, x_tiles, weight_tiles, full, empty, n_rows, d_ff, width, STAGES: gl.constexpr):
    step = 0
    for tile in range(gl.program_id(0), _tiles(n_rows, d_ff), gl.num_programs(0)):
        row, col = _tile_of(tile, n_rows, d_ff)
        for start in range(0, width, _K):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            bar, weight = full.index(slot), weight_tiles.index(slot)
            mbarrier.expect(bar, 3 * _M * _K * 2)
            tma.async_copy_global_to_shared(x_desc, [row, start], bar, x_tiles.index(slot))
            tma.async_copy_global_to_shared(weight_desc, [col, start], bar, weight.slice(0, _M, dim=0))
            tma.async_copy_global_to_shared(weight_desc, [d_ff + col, start], bar, weight.slice(_M, _M, dim=0))
            step += 1


@gluon.jit
def _activated(gate, up):
    """In the dtype of the product that follows. Backward has gate and up as they are stored, so that forward computes
    with the same values."""
    wide = gate.to(gl.float32)
    return (wide * _sigmoid(wide) * up.to(gl.float32)).to(gate.dtype)


@gluon.jit
def _activate_tile(
    late, before, gate_up_desc, hidden_desc, x_tiles, weight_tiles, outgoing, full, empty, step, row, col, d_ff, width,
    STAGES: gl.constexpr, LATE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """A group's rows of one tile, while the second half of its hidden units in the tile before is stored."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * _M, 16])
    acc = gl.zeros((_P, 2 * _M), gl.float32, layout)
    for i in gl.static_range(LATE):
        acc = add_step(acc, x_tiles, weight_tiles, full, empty, step, i > 0, _P, 2 * _M, STAGES, WHICH)
        if before[0]:
            _send_late(late, before, gate_up_desc, hidden_desc, d_ff, outgoing, i)
        step += 1
    for start in range(LATE * _K, width, _K):
        acc = add_step(acc, x_tiles, weight_tiles, full, empty, step, start > 0, _P, 2 * _M, STAGES, WHICH)
        step += 1
    acc = end_sum(acc, empty, step, STAGES)
    # Columns that lie 64 or 128 apart are in the same thread: nothing moves.
    gates, ups = rounded(acc, hidden_desc.dtype).reshape((_P, 2, _M)).permute((0, 2, 1)).split()
    first_gate, second_gate = gates.reshape((_P, 2, _P)).permute((0, 2, 1)).split()
    first_up, second_up = ups.reshape((_P, 2, _P)).permute((0, 2, 1)).split()
    top = row + WHICH * _P
    send(first_gate, gate_up_desc, top, col, outgoing, 0)
    send(first_up, gate_up_desc, top, d_ff + col, outgoing, 1)
    send(_activated(first_gate, first_up), hidden_desc, top, col, outgoing, 0)
    like: gl.constexpr = late[0].type.layout
    second_gate = gl.convert_layout(second_gate, like, assert_trivial=True)
    second_up = gl.convert_layout(second_up, like, assert_trivial=True)
    late = (second_gate, second_up, _activated(second_gate, second_up))
    if LATE == 0:
        for i in gl.static_range(3):
            _send_late(late, (True, top, col), gate_up_desc, hidden_desc, d_ff, outgoing, i)
    return late, step


@gluon.jit
def _send_late(late, at, gate_up_desc, hidden_desc, d_ff, outgoing, PART: gl.constexpr):
    """One of the three parts that the second half of a tile's hidden units has."""
    col = at[2] + _P
    if PART == 0:
        send(late[0], gate_up_desc, at[1], col, outgoing, 1)
    elif PART == 1:
        send(late[1], gate_up_desc, at[1], d_ff + col, outgoing, 0)
    else:
        send(late[2], hidden_desc, at[1], col, outgoing, 1)


@gluon.jit
def _activate_tiles(
    gate_up_desc, hidden_desc, x_tiles, weight_tiles, outgoing, full, empty, n_rows, d_ff, width,
    STAGES: gl.constexpr, LATE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _P, 16])
    part = gl.zeros((_P, _P), hidden_desc.dtype, layout)
    late = (part, part, part)
    some, top, left = False, 0, 0  # whether anything is left to be stored, and where
    step = 0
    for tile in range(gl.program_id(0), _tiles(n_rows, d_ff), gl.num_programs(0)):
        row, col = _tile_of(tile, n_rows, d_ff)
        late, step = _activate_tile(
            late, (some, top, left), gate_up_desc, hidden_desc, x_tiles, weight_tiles, outgoing, full, empty, step,
            row, col, d_ff, width, STAGES, LATE, WHICH,
        )  # fmt: skip
        some, top, left = True, row + WHICH * _P, col
    for i in gl.static_range(LATE):
        if some:
            _send_late(late, (some, top, left), gate_up_desc, hidden_desc, d_ff, outgoing, i)
    tma.store_wait(0)


@gluon.jit
def swiglu_mlp_hopper_fwd_kernel(
    x_desc, weight_desc, gate_up_desc, hidden_desc, n_rows, d_ff, width, STAGES: gl.constexpr, LATE: gl.constexpr
):
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES, _M, _K], x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, 2 * _M, _K], weight_desc.layout)
    upper = gl.allocate_shared_memory(hidden_desc.dtype, [2, _P, _P], hidden_desc.layout)
    lower = gl.allocate_shared_memory(hidden_desc.dtype, [2, _P, _P], hidden_desc.layout)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)  # both groups have read a buffer before it is free
    fence_async_shared()
    gl.warp_specialize([
        (_activate_tiles, (gate_up_desc, hidden_desc, x_tiles, weight_tiles, upper, full, empty,
                           n_rows, d_ff, width, STAGES, LATE, 0)),
        (_activate_tiles, (gate_up_desc, hidden_desc, x_tiles, weight_tiles, lower, full, empty,
                           n_rows, d_ff, width, STAGES, LATE, 1)),
        (_fetch_forward, (x_desc, weight_desc, x_tiles, weight_tiles, full, empty, n_rows, d_ff, width, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _fetch_backward(
    dy_desc, weight_desc, dy_tiles, weight_tiles, full, empty, n_rows, d_ff, width, STAGES: gl.constexpr
):
    step = 0
    for tile in range(gl.program_id(0), _tiles(n_rows, d_ff), gl.num_programs(0)):
        row, col = _tile_of(tile, n_rows, d_ff)
        for start in range(0, width, _K):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, 2 * _M * _K * 2)
            tma.async_copy_global_to_shared(dy_desc, [row, start], bar, dy_tiles.index(slot))
            tma.async_copy_global_to_shared(weight_desc, [start, col], bar, weight_tiles.index(slot))
            step += 1


@gluon.jit
def _fetch_gate_up(gate_up_desc, gates, ups, full, empty, n_rows, d_ff):
    turn = 0
    for tile in range(gl.program_id(0), _tiles(n_rows, d_ff), gl.num_programs(0)):
        row, col = _tile_of(tile, n_rows, d_ff)
        for part in gl.static_range(4):
            mbarrier.wait(empty.index(part), (turn & 1) ^ 1)
            bar = full.index((turn & 1) * 4 + part)
            mbarrier.expect(bar, 2 * _P * _P * 2)
            top, left = row + part // 2 * _P, col + part % 2 * _P
            tma.async_copy_global_to_shared(gate_up_desc, [top, left], bar, gates.index(part))
            tma.async_copy_global_to_shared(gate_up_desc, [top, d_ff + left], bar, ups.index(part))
        turn += 1  # noqa: SIM113


@gluon.jit
def _differentiate(
    arriving, dgate_up_desc, hidden_desc, gates, ups, full, row, col, d_ff, phase,
    PART: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """A quarter of a tile, given the gradient that arrives at the activation there."""
    mbarrier.wait(full.index(WHICH * 4 + PART), phase)
    layout: gl.constexpr = arriving.type.layout
    gate_buffer, up_buffer = gates.index(PART), ups.index(PART)
    gate = gate_buffer.load(layout).to(gl.float32)
    up = up_buffer.load(layout).to(gl.float32)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    top, left = row + PART // 2 * _P, col + PART % 2 * _P
    if hidden_desc is not None:
        up_buffer.store((silu * up).to(hidden_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(hidden_desc, [top, left], up_buffer)
    dgate = arriving * up * (silu * (1.0 - sigmoid) + sigmoid)
    dup = arriving * silu
    gate_buffer.store(dgate.to(dgate_up_desc.dtype))
    if hidden_desc is not None:
        fence_async_shared()
        tma.async_copy_shared_to_global(dgate_up_desc, [top, left], gate_buffer)
        tma.store_wait(1)  # all but gate's, which is on its way meanwhile: up's buffer has been read
    up_buffer.store(dup.to(dgate_up_desc.dtype))
    fence_async_shared()
    if hidden_desc is None:
        tma.async_copy_shared_to_global(dgate_up_desc, [top, left], gate_buffer)
    tma.async_copy_shared_to_global(dgate_up_desc, [top, d_ff + left], up_buffer)


@gluon.jit
def _differentiate_tiles(
    dgate_up_desc, hidden_desc, dy_tiles, weight_tiles, gates, ups, full, empty, read, written, turns,
    n_rows, d_ff, width, STAGES: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _M, 16])
    steps = gl.cdiv(width, _K)
    programs = gl.num_programs(0)
    turn = 0  # of this group: of the program's tiles it takes number 2 turn + WHICH
    for tile in range(gl.program_id(0) + WHICH * programs, _tiles(n_rows, d_ff), 2 * programs):
        row, col = _tile_of(tile, n_rows, d_ff)
        upper = gl.zeros((_P, _M), gl.float32, layout)
        lower = gl.zeros((_P, _M), gl.float32, layout)
        # One group after the other: a barrier that is a whole turn behind would look as if it had been passed.
        mbarrier.wait(turns.index(WHICH), (turn & 1) ^ (1 - WHICH))
        step = (2 * turn + WHICH) * steps
        for k in range(steps):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            dy, weight = dy_tiles.index(slot), weight_tiles.index(slot)
            upper = warpgroup_mma(dy.slice(0, _P, dim=0), weight, upper, is_async=True)
            lower = warpgroup_mma(dy.slice(_P, _P, dim=0), weight, lower, is_async=True)
            upper, lower = warpgroup_mma_wait(2, deps=(upper, lower))  # the step before is done, and its buffer free
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        mbarrier.arrive(turns.index(1 - WHICH))
        upper, lower = warpgroup_mma_wait(0, deps=(upper, lower))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))

        # A buffer is free for the next tile when the two gradients that were stored from it have left.
        phase = turn & 1
        first, second = upper.reshape((_P, 2, _P)).permute((0, 2, 1)).split()
        _differentiate(first, dgate_up_desc, hidden_desc, gates, ups, read, row, col, d_ff, phase, 0, WHICH)
        _differentiate(second, dgate_up_desc, hidden_desc, gates, ups, read, row, col, d_ff, phase, 1, WHICH)
        tma.store_wait(2)
        mbarrier.arrive(written.index(0))
        third, fourth = lower.reshape((_P, 2, _P)).permute((0, 2, 1)).split()
        _differentiate(third, dgate_up_desc, hidden_desc, gates, ups, read, row, col, d_ff, phase, 2, WHICH)
        tma.store_wait(2)
        mbarrier.arrive(written.index(1))
        _differentiate(fourth, dgate_up_desc, hidden_desc, gates, ups, read, row, col, d_ff, phase, 3, WHICH)
        tma.store_wait(2)
        mbarrier.arrive(written.index(2))
        tma.store_wait(0)
        mbarrier.arrive(written.index(3))
        turn += 1  # noqa: SIM113


@gluon.jit
def swiglu_mlp_hopper_bwd_kernel(
    dy_desc, weight_desc, gate_up_desc, dgate_up_desc, hidden_desc, n_rows, d_ff, width, STAGES: gl.constexpr
):
    dy_tiles = gl.allocate_shared_memory(dy_desc.dtype, [STAGES, _M, _K], dy_desc.layout)
    weight_tiles = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, _K, _M], weight_desc.layout)
    gates = gl.allocate_shared_memory(gate_up_desc.dtype, [4, _P, _P], gate_up_desc.layout)
    ups = gl.allocate_shared_memory(gate_up_desc.dtype, [4, _P, _P], gate_up_desc.layout)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 1)
    read, written, turns = barriers(8, 1), barriers(4, 1), barriers(2, 1)  # `read` has four for each group
    fence_async_shared()
    gl.warp_specialize([
        (_differentiate_tiles, (dgate_up_desc, hidden_desc, dy_tiles, weight_tiles, gates, ups, full, empty,
                                read, written, turns, n_rows, d_ff, width, STAGES, 0)),
        (_differentiate_tiles, (dgate_up_desc, hidden_desc, dy_tiles, weight_tiles, gates, ups, full, empty,
                                read, written, turns, n_rows, d_ff, width, STAGES, 1)),
        (_fetch_backward, (dy_desc, weight_desc, dy_tiles, weight_tiles, full, empty, n_rows, d_ff, width, STAGES)),
        (_fetch_gate_up, (gate_up_desc, gates, ups, read, written, n_rows, d_ff)),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


def programs(x: Tensor, d_ff: int) -> int:
    """One a multiprocessor, whose shared memory it fills, or one a tile."""
    return min(-(-x.shape[0] // BLOCK) * (d_ff // BLOCK), gpu_of(x.device).multiprocessors)


def activate(x: Tensor, weight: Tensor, gate_up: Tensor, hidden: Tensor) -> None:
    """Writes x weight^T to `gate_up` [rows, 2 d_ff] and the activation's result to `hidden` [rows, d_ff]."""
    (n_rows, width), d_ff = x.shape, hidden.shape[1]
    late = _LATE_PARTS if width > (_LATE_PARTS - 1) * _DEPTH else 0
    swiglu_mlp_hopper_fwd_kernel[(programs(x, d_ff),)](
        described(x, BLOCK, _DEPTH), described(weight, BLOCK, _DEPTH), described(gate_up, _PART, _PART),
        described(hidden, _PART, _PART), n_rows, d_ff, width, STAGES=_FORWARD_STAGES, LATE=late, **RESOURCES,
    )  # fmt: skip


def differentiate(dy: Tensor, weight: Tensor, gate_up: Tensor, dgate_up: Tensor, hidden: Tensor | None) -> None:
    """Writes the gradient of gate and up to `dgate_up`, given that of the result and down's weight [d_model, d_ff], and
    once more the activation's result to `hidden`, if it is given."""
    n_rows, (width, d_ff) = dy.shape[0], weight.shape
    swiglu_mlp_hopper_bwd_kernel[(programs(dy, d_ff),)](
        described(dy, BLOCK, _DEPTH), described(weight, _DEPTH, BLOCK), described(gate_up, _PART, _PART),
        described(dgate_up, _PART, _PART), None if hidden is None else described(hidden, _PART, _PART),
        n_rows, d_ff, width, STAGES=_BACKWARD_STAGES, **RESOURCES,
    )  # fmt: skip
