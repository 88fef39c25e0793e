"""`cross_entropy` in Triton: loss and gradient with one read and one write of device memory, at any vocabulary.

A program walks a row twice: once for the maximum and the sum of exponentials, once, backwards, for the gradient. Few
rows are under way at a time, so that the second walk finds the row in the L2 cache; where they fill it, the end of each
stays in registers. Backward has nothing left to do where the upstream gradient is one, and sees that on the device.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.operator import (
    TRITON_DEVICES,
    as_rows,
    in_compiled_step,
    l2_bytes,
    make_operator,
    refuse_second_derivative,
    require_triton,
    sm_count,
    through_dispatcher,
)
from llmmed.kernels.tunable import Tunable


@triton.jit
def cross_entropy_triton_factor_kernel(
    targets_ptr, scale_ptr, factor_ptr, targets_stride, n_rows, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    # factor = scale / rows that count, zero if none does, in float64: it is rounded once, together with the upstream
    # gradient. One program: the targets are few.
    counts = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        targets = tl.load(targets_ptr + rows.to(tl.int64) * targets_stride, mask=rows < n_rows, other=ignore_index)
        counts += (targets != ignore_index).to(tl.int32)
    count = tl.sum(counts, axis=0)
    scale = tl.full((), 1.0, dtype=tl.float64)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float64)
    mean = scale / tl.maximum(count, 1).to(tl.float64)
    tl.store(factor_ptr, tl.where(count > 0, mean, 0.0))


@triton.jit
def target_of(targets_ptr, targets_stride, row, n_rows):
    # Loaded a row ahead: nothing of a row can begin before its target is known.
    return tl.load(targets_ptr + row * targets_stride, mask=row < n_rows, other=0)


@triton.jit
def held_columns(logits, V: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr):
    # The last HELD columns of a row, which stay in registers from one walk to the other; the walks end before them.
    if HELD > 0:
        tl.static_assert(HELD < PADDED)
        return _load_columns(logits, _lanes(logits, PADDED - HELD, HELD), V, PADDED, False, "")
    else:
        return 0  # triton 3.6 cannot return None


@triton.jit
def row_statistics(
    logits, held,
    V: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    # Maximum and sum of exponentials of one row of V logits, which the cache is to keep if it is walked AGAIN. What
    # follows the logits up to PADDED is read and left out: a mask that ends between 16 bytes would take all loads
    # apart.
    EVICTION: tl.constexpr = "evict_last" if AGAIN else ""
    WALKED: tl.constexpr = PADDED - HELD
    offsets = _lanes(logits, 0, BLOCK)
    lane_max, lane_sum = _empty_lanes(offsets.shape[0])
    for start in tl.range(0, WALKED, BLOCK, num_stages=STAGES):
        x = _load_columns(logits, start + offsets, V, WALKED, WALKED % BLOCK != 0, EVICTION)
        lane_max, lane_sum = _add_to_lanes(x, lane_max, lane_sum)
    row_max, row_sum = _join_lanes(lane_max, lane_sum)
    if HELD > 0:
        lane_max, lane_sum = _empty_lanes(held.shape[0])
        lane_max, lane_sum = _add_to_lanes(held, lane_max, lane_sum)
        held_max, held_sum = _join_lanes(lane_max, lane_sum)
        walked_max = row_max
        row_max = tl.maximum(walked_max, held_max)
        row_sum = row_sum * tl.exp(walked_max - row_max) + held_sum * tl.exp(held_max - row_max)
    return row_max, row_sum


@triton.jit
def _lanes(logits, START: tl.constexpr, COLUMNS: tl.constexpr):
    # Columns from START on, each lane's neighbouring ones, what one load brings to a thread, in a row of their own.
    WIDTH: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    return START + tl.arange(0, COLUMNS // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _load_columns(logits, cols, V: tl.constexpr, END: tl.constexpr, MASKED: tl.constexpr, EVICTION: tl.constexpr):
    if MASKED:
        x = tl.load(logits + cols, mask=cols < END, other=float("-inf"), eviction_policy=EVICTION)
    else:
        x = tl.load(logits + cols, eviction_policy=EVICTION)
    if END > V:
        x = tl.where(cols < V, x, float("-inf"))
    return x


@triton.jit
def _empty_lanes(LANES: tl.constexpr):
    # Lanes of the last block may see no element: finite, also times log2(e).
    return tl.full((LANES,), -1.0e38, dtype=tl.float32), tl.zeros((LANES,), dtype=tl.float32)


@triton.jit
def _add_to_lanes(x, lane_max, lane_sum):
    # Each lane keeps a maximum and a sum of its own, so that threads meet once, after the loop.
    x = x.to(tl.float32)
    new_max = tl.maximum(lane_max, tl.max(x, axis=1))
    exponentials = _exp_difference(x, new_max[:, None], x.shape[1])
    return new_max, lane_sum * tl.exp(lane_max - new_max) + tl.sum(exponentials, axis=1)


@triton.jit
def _join_lanes(lane_max, lane_sum):
    row_max = tl.max(lane_max, axis=0)
    return row_max, tl.sum(lane_sum * tl.exp(lane_max - row_max), axis=0)


@triton.jit
def _exp_difference(x, y, WIDTH: tl.constexpr):
    # exp(x - y). For 16-bit logits as one multiply-add and one exponential: its error, some 1e-5 at logits of 100, is
    # far below theirs.
    if WIDTH == 8:
        LOG2_E: tl.constexpr = 1.4426950408889634
        return tl.exp2(x * LOG2_E - y * LOG2_E)
    else:
        return tl.exp(x - y)


@triton.jit
def write_gradient(
    logits, gradient, held, target, chosen, row_max, row_sum, factor,
    V: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    # factor * (softmax - one_hot(target)), which may overwrite the logits; `chosen` is the target's logit. Columns from
    # V to PADDED become zero.
    WIDTH: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    WALKED: tl.constexpr = PADDED - HELD
    if WIDTH == 8:
        log_sum = row_max + tl.log(row_sum)
        rest = factor
    else:
        log_sum = row_max
        rest = tl.div_rn(factor, row_sum)
    if HELD > 0:
        _store_gradient(held, gradient, _lanes(logits, WALKED, HELD), log_sum, rest, PADDED, WIDTH, False)
    # The last blocks first: they were read last, and are the likeliest to be in the cache.
    last = (WALKED - 1) // BLOCK
    for i in tl.range(0, last + 1, num_stages=STAGES):
        cols = (last - i) * BLOCK + tl.arange(0, BLOCK)
        x = _load_columns(logits, cols, V, WALKED, WALKED % BLOCK != 0, "")
        _store_gradient(x, gradient, cols, log_sum, rest, WALKED, WIDTH, WALKED % BLOCK != 0)
    # The target's entry is written again, since comparing every column with it would cost as much as the exponential;
    # and exactly, since a probability close to one cancels.
    tl.debug_barrier()
    at_target = (tl.exp(chosen - row_max) / row_sum - 1.0) * factor
    is_class = (target >= 0) & (target < V)
    tl.store(gradient + target, at_target.to(gradient.dtype.element_ty), mask=is_class)


@triton.jit
def _store_gradient(
    x, gradient, cols, log_sum, rest, END: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    dx = (_exp_difference(x.to(tl.float32), log_sum, WIDTH) * rest).to(gradient.dtype.element_ty)
    if MASKED:
        tl.store(gradient + cols, dx, mask=cols < END, cache_modifier=".cs")
    else:
        tl.store(gradient + cols, dx, cache_modifier=".cs")


@triton.jit
def write_zeros(gradient, V: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), dtype=gradient.dtype.element_ty)
        tl.store(gradient + cols, zeros, mask=cols < V, cache_modifier=".cs")


@triton.jit
def cross_entropy_triton_fwd_kernel(
    logits_ptr, targets_ptr, factor_ptr, losses_ptr, statistics_ptr, gradient_ptr,
    logits_stride, targets_stride, n_rows, ignore_index,
    V: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr).to(tl.float32)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    target = target_of(targets_ptr, targets_stride, first, n_rows)
    for row in tl.range(first, n_rows, step):
        row += tl.full((), 0, tl.int64)  # the interpreter counts in plain integers
        next_target = target_of(targets_ptr, targets_stride, row + step, n_rows)
        logits = logits_ptr + row * logits_stride
        gradient = gradient_ptr + row * V
        if target == ignore_index:
            tl.store(losses_ptr + row, 0.0)
            tl.store(statistics_ptr + row, 0.0)
            tl.store(statistics_ptr + n_rows + row, 1.0)
            if GRADIENT:
                write_zeros(gradient, V, BLOCK)
        else:
            # A target that is no class must not read foreign memory: its loss is NaN, which nobody overlooks.
            is_class = (target >= 0) & (target < V)
            chosen = tl.load(logits + target, mask=is_class, other=float("nan")).to(tl.float32)
            held = held_columns(logits, V, V, HELD)
            row_max, row_sum = row_statistics(logits, held, V, V, BLOCK, STAGES, HELD, GRADIENT)
            tl.store(losses_ptr + row, ((row_max - chosen) + tl.log(row_sum)) * factor)
            tl.store(statistics_ptr + row, row_max)
            tl.store(statistics_ptr + n_rows + row, row_sum)
            if GRADIENT:
                write_gradient(
                    logits, gradient, held, target, chosen, row_max, row_sum, factor, V, V, BLOCK, STAGES, HELD
                )
        target = next_target


@triton.jit
def cross_entropy_triton_bwd_kernel(
    upstream_ptr, logits_ptr, targets_ptr, factor_ptr, statistics_ptr, gradient_ptr,
    logits_stride, targets_stride, n_rows, ignore_index,
    V: tl.constexpr, BLOCK: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    upstream = tl.load(upstream_ptr)
    end = n_rows
    if WRITTEN:
        # The gradient is there already, for an upstream gradient of one. For another it is computed anew rather than
        # multiplied: what was rounded to float16 would not come back.
        end = tl.where(upstream == 1.0, 0, n_rows)
    factor = (tl.load(factor_ptr) * upstream).to(tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), end, tl.num_programs(0)):
        row += tl.full((), 0, tl.int64)
        gradient = gradient_ptr + row * V
        target = tl.load(targets_ptr + row * targets_stride)
        if target == ignore_index:
            write_zeros(gradient, V, BLOCK)
        else:
            row_max = tl.load(statistics_ptr + row)
            row_sum = tl.load(statistics_ptr + n_rows + row)
            logits = logits_ptr + row * logits_stride
            chosen = tl.load(logits + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
            write_gradient(logits, gradient, None, target, chosen, row_max, row_sum, factor, V, V, BLOCK, 1, 0)


class Launch(NamedTuple):
    """Columns a program walks at a time, loads ahead, its warps, programs per multiprocessor, and the columns at the
    end of a row that it holds in registers from one walk to the other.
    """

    block: int
    stages: int
    num_warps: int
    per_sm: int
    held: int

    def programs(self, n_rows: int, device: torch.device) -> int:
        return max(1, min(n_rows, self.per_sm * sm_count(device)))


def launch(device: torch.device, vocab: int, itemsize: int, gradient: bool = True) -> Launch:
    """Two loads of 16 bytes a lane, and as many lanes as a program can have: few rows under way, so that a quarter of
    the L2 cache holds them (the gradients pass through it as well), and still enough loads on their way. Where one row
    a multiprocessor takes more than half of it, a part of the row is held, if no more than half of it. Where nothing
    can be held or there is no second walk, fewer warps and loads ahead through shared memory do better there.
    """
    block = min(32768 // itemsize, max(128, triton.next_power_of_2(vocab)))
    num_warps = max(4, min(32, block * itemsize // 1024))
    under_way = vocab * itemsize * sm_count(device)  # with one program a multiprocessor
    if 2 * under_way > l2_bytes(device) and num_warps == 32:
        held = _held(vocab, itemsize, gradient)
        return Launch(block, 1, 16, 1, held) if 0 < 2 * held <= vocab else Launch(block, 4, 16, 2, 0)
    return Launch(block, 1, num_warps, max(1, min(64 // num_warps, l2_bytes(device) // 4 // under_way)), 0)


def _held(vocab: int, itemsize: int, gradient: bool) -> int:
    """Columns of a row that a program may hold, 64 KiB: twice as many spill. None where rows are read one element at a
    time, whose addresses spill too: Triton sees that loads are whole where 16 divides the stride.
    """
    held = 65536 // itemsize
    return held if gradient and held < vocab and vocab % 16 == 0 else 0


def alternatives(device: torch.device, vocab: int, itemsize: int, gradient: bool = True) -> Iterator[Launch]:
    """Where a part of the row is held, more warps; else two programs a multiprocessor instead of one, and one instead
    of more, blocks of half the size by half as many warps, and a part held. Then what either side of `launch`'s bound
    takes that holds nothing: loads ahead through shared memory and none.
    """
    block, stages, num_warps, per_sm, held = launch(device, vocab, itemsize, gradient)
    if held:
        yield Launch(block, stages, 2 * num_warps, per_sm, held)
    else:
        half, half_warps = max(128, block // 2), max(4, num_warps // 2)
        yield Launch(block, stages, num_warps, 3 - min(2, per_sm), 0)
        yield Launch(half, stages, half_warps, 2 * per_sm, 0)
        yield Launch(half, stages, half_warps, per_sm, 0)
        yield Launch(block, 1, 16, 1, _held(vocab, itemsize, gradient))
    yield Launch(block, 1, 32, 1, 0)
    yield Launch(block, 4, min(16, num_warps), 2, 0)


_FORWARD = Tunable(
    "cross_entropy_triton_fwd_kernel",
    lambda device, vocab, itemsize, gradient: launch(device, vocab, itemsize, bool(gradient)),
    lambda device, vocab, itemsize, gradient: alternatives(device, vocab, itemsize, bool(gradient)),
)


def mean_factor(targets: Tensor, ignore_index: int, scale: Tensor | None) -> Tensor:
    """scale / rows that count, 0-d float64 on the device; zero if no row counts."""
    factor = torch.empty((), dtype=torch.float64, device=targets.device)
    cross_entropy_triton_factor_kernel[(1,)](
        targets, scale, factor, targets.stride(0), targets.shape[0], ignore_index, BLOCK=4096, num_warps=8
    )
    return factor


def _compute(
    logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss; row maxima and sums of exponentials [2, rows]; scale / rows that count; the gradient, or nothing."""
    rows = as_rows(logits)
    n_rows, vocab = rows.shape
    factor = mean_factor(targets, ignore_index, scale)
    losses = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    statistics = torch.empty((2, n_rows), dtype=torch.float32, device=logits.device)
    gradient = torch.empty((n_rows, vocab) if with_gradient else (0,), dtype=logits.dtype, device=logits.device)
    # Whether the gradient is written is another kernel: eager mode's writes it, a compiled step's does not.
    block, stages, num_warps, _, held = how = _FORWARD(
        logits.device, vocab=vocab, itemsize=logits.element_size(), gradient=int(with_gradient)
    )
    cross_entropy_triton_fwd_kernel[(how.programs(n_rows, logits.device),)](
        rows, targets, factor, losses, statistics, gradient, rows.stride(0), targets.stride(0), n_rows, ignore_index,
        V=vocab, BLOCK=block, STAGES=stages, HELD=held, GRADIENT=with_gradient, num_warps=num_warps,
    )  # fmt: skip
    return losses.sum(), statistics, factor, gradient


def _write(
    gradient: Tensor, upstream: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, factor: Tensor,
    ignore_index: int, written: bool,
) -> Tensor:  # fmt: skip
    """Fills `gradient` for an upstream gradient; `written` if it already holds the one for one."""
    rows = as_rows(logits)
    n_rows, vocab = rows.shape
    block, _, num_warps, _, _ = launch(logits.device, vocab, logits.element_size(), gradient=False)
    programs = max(1, min(n_rows, 64 // num_warps * sm_count(logits.device)))  # nothing is read twice: all that fit
    cross_entropy_triton_bwd_kernel[(programs,)](
        upstream, rows, targets, factor, statistics, gradient, rows.stride(0), targets.stride(0), n_rows, ignore_index,
        V=vocab, BLOCK=block, WRITTEN=written, num_warps=num_warps,
    )  # fmt: skip
    return gradient


class _Direct(torch.autograd.Function):
    """Eager mode: the gradient is written beside the loss, into a buffer that the first backward pass gives away; or as
    in a compiled step, by backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None, differentiable: bool,
        writes: bool,
    ) -> Tensor:  # fmt: skip
        loss, statistics, factor, gradient = _compute(logits, targets, ignore_index, scale, writes)
        if differentiable:
            ctx.save_for_backward(logits, targets, statistics, factor)
            ctx.ignore_index, ctx.gradient = ignore_index, gradient if writes else None
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("cross_entropy (triton)")
        gradient, ctx.gradient = ctx.gradient, None  # a second pass over a retained graph must not write into it
        written = gradient is not None
        logits, targets, statistics, factor = ctx.saved_tensors
        if gradient is None:
            gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        _write(gradient, upstream, logits, targets, statistics, factor, ctx.ignore_index, written)
        return gradient, None, None, None, None, None


def _forward(
    logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return _compute(logits, targets, ignore_index, scale, with_gradient=False)[:3]


def _fake_forward(
    logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    loss, statistics = (logits.new_empty(shape, dtype=torch.float32) for shape in ((), (2, logits.shape[0])))
    return loss, statistics, logits.new_empty((), dtype=torch.float64)


def _backward(
    upstream: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, factor: Tensor, ignore_index: int
) -> tuple[Tensor]:
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return (_write(gradient, upstream, logits, targets, statistics, factor, ignore_index, written=False),)


def _fake_backward(
    upstream: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, factor: Tensor, ignore_index: int
) -> tuple[Tensor]:
    return (logits.new_empty(logits.shape),)


# Compiled graphs are functional: a gradient that backward finishes in place would be copied first. There backward reads
# the logits again, three passes over memory instead of two.
_operator = make_operator(
    "llmmed::cross_entropy_triton",
    forward=_forward,
    fake_forward=_fake_forward,
    backward=_backward,
    fake_backward=_fake_backward,
    save=lambda arguments, results: (arguments[0], arguments[1], results[1], results[2], arguments[2]),
    gradients=("logits",),
)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None) -> Tensor:
    """See `reference.cross_entropy`. The loss is NaN if a target is neither a class nor ignored."""
    if through_dispatcher(logits):
        loss: Tensor = _operator(logits, targets, ignore_index, scale)
        return loss
    differentiable = logits.requires_grad and torch.is_grad_enabled()
    writes = differentiable and not in_compiled_step()
    loss = _Direct.apply(logits, targets, ignore_index, scale, differentiable, writes)
    return loss


def _load() -> Callable[..., Any]:
    require_triton()
    return cross_entropy


IMPL = Implementation(
    "triton",
    load=_load,
    devices=TRITON_DEVICES,
    kernel_names=("cross_entropy_triton_fwd_kernel", "cross_entropy_triton_bwd_kernel"),
    tunable=(_FORWARD,),
)
