"""`linear_cross_entropy` without a pass over its logits: the product that computes them writes their exponentials.

A row's gradient is softmax - one_hot, and softmax is exp(logits - shift) / sum, for any shift. The sum is known only
after the whole row; but it is a factor of the row, which the hidden states take over in one of the products that
follow, and the result in the other. With E = exp(logits - shift), zero at each row's target, s = 1 / the row's sum, the
target's exponential included, and p the target's probability,

    dX = s * (E W) + (p - 1) * W[target],    dW = E^T (s * X) + one_hot^T ((p - 1) * X),

so that what is written of the logits is read by products alone, and all else is as narrow as the model. What the target
adds is most of a gradient; it is never rounded before it is added, in float32, in an order that is always the same.

The shift is the target's logit: the sum is then the exponential of the row's loss, at least one. Where it is above
2^64, at a loss of 44 nats, the row's maximum becomes the shift, and the product is computed again for blocks of rows
that have such a row. Whether there are any is only known on the device, where the second product ends at once if there
are none. Exponentials are bfloat16, of float32's range; float16 cannot hold them.

The target's logit is summed twice, here and in the product, in two orders. So p and the loss are off by about 1e-6
times the logit, where that of PyTorch, rounded to bfloat16, is off by 4e-3 times itself.
"""

# Annotations are arguments' kinds, for the compiler. So no `from __future__` here.
import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.linear_cross_entropy import hopper
from llmmed.kernels.linear_cross_entropy.products import add_product
from llmmed.kernels.operator import INTERPRETED, capability, describable

_FAR = 1e30  # the shift of a row without a target: its exponentials are zero
_MOST = 2.0**64  # of a row's sum; single exponentials end at 2^100
_PLACES = 32  # of rows in the order of their targets, a program
# What kernels are compiled once for, whatever it is: nothing is faster for knowing it.
_SIZES = ("n_rows", "n_tiles", "vocab", "ignore_index", "targets_stride", "exponentials_stride")
_VECTORS = (
    "targets_ptr", "classes_ptr", "chosen_ptr", "shifts_ptr", "totals_ptr", "sums_ptr", "maxima_ptr", "again_ptr",
    "losses_ptr", "factors_ptr", "residuals_ptr", "exponentials_ptr", "sorted_ptr", "order_ptr",
)  # fmt: skip


def takes(hidden_states: Tensor, weight: Tensor) -> bool:
    """Whether these [rows, width], with unit stride in the last dimension, and [vocab, width] go this way."""
    if INTERPRETED or capability(hidden_states.device) != 90 or hidden_states.dtype != torch.bfloat16:
        return False
    if not hidden_states.numel() or not weight.numel() or not weight.is_contiguous():
        return False
    apart = hidden_states.stride(0)
    return apart >= hidden_states.shape[1] and apart % 8 == 0 and describable(hidden_states, weight)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_VECTORS)
def linear_cross_entropy_hopper_fwd_target_kernel(
    hidden_ptr, weight_ptr, targets_ptr, classes_ptr, chosen_ptr, shifts_ptr,
    hidden_stride, targets_stride, n_rows, width, vocab, ignore_index,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    # Each row's class, which is -1 where it does not count or has none, and its logit, which is also its first shift.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets_ptr + rows * targets_stride, mask=rows < n_rows, other=ignore_index)
    counts = (target != ignore_index) & (target >= 0) & (target < vocab)
    products = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = counts[:, None] & (cols < width)[None, :]
        x = tl.load(hidden_ptr + rows[:, None] * hidden_stride + cols[None, :], mask=mask, other=0.0)
        w = tl.load(weight_ptr + target[:, None] * width + cols[None, :], mask=mask, other=0.0)
        products += x.to(tl.float32) * w.to(tl.float32)
    # A target that is no class has no logit: its loss is NaN, which nobody overlooks.
    chosen = tl.where(counts | (target == ignore_index), tl.sum(products, axis=1), float("nan"))
    tl.store(classes_ptr + rows, tl.where(counts, target, -1).to(tl.int32), mask=rows < n_rows)
    tl.store(chosen_ptr + rows, chosen, mask=rows < n_rows)
    tl.store(shifts_ptr + rows, tl.where(counts, chosen, FAR), mask=rows < n_rows)


@triton.jit
def _over_tiles(values_ptr, rows, n_rows, n_tiles, TILES: tl.constexpr, MAXIMUM: tl.constexpr):
    # Sums over tiles of classes, or maxima, for these rows of [tiles, rows].
    found = tl.full((TILES, rows.shape[0]), float("-inf") if MAXIMUM else 0.0, dtype=tl.float32)
    for start in range(0, n_tiles, TILES):
        tiles = start + tl.arange(0, TILES)
        mask = (tiles < n_tiles)[:, None] & (rows < n_rows)[None, :]
        at = values_ptr + tiles[:, None].to(tl.int64) * n_rows + rows[None, :]
        if MAXIMUM:
            found = tl.maximum(found, tl.load(at, mask=mask, other=float("-inf")))
        else:
            found += tl.load(at, mask=mask, other=0.0)
    return tl.max(found, axis=0) if MAXIMUM else tl.sum(found, axis=0)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_VECTORS)
def linear_cross_entropy_hopper_fwd_sum_kernel(
    sums_ptr, maxima_ptr, shifts_ptr, totals_ptr, again_ptr, n_rows, n_tiles,
    ROWS: tl.constexpr, TILES: tl.constexpr, TILE_ROWS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    # Each row's sum. Where it is too large, the row's maximum becomes its shift, and its block of rows is marked.
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    total = _over_tiles(sums_ptr, rows, n_rows, n_tiles, TILES, False)
    tl.store(totals_ptr + rows, total, mask=rows < n_rows)
    too_large = total > MOST
    if tl.max(too_large.to(tl.int32), axis=0) != 0:
        tl.store(again_ptr, 1)
        tl.store(again_ptr + 1 + first // TILE_ROWS, 1)
        maximum = _over_tiles(maxima_ptr, rows, n_rows, n_tiles, TILES, True)
        tl.store(shifts_ptr + rows, maximum, mask=too_large & (rows < n_rows))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_VECTORS)
def linear_cross_entropy_hopper_fwd_rows_kernel(
    hidden_ptr, classes_ptr, chosen_ptr, shifts_ptr, totals_ptr, sums_ptr, again_ptr,
    exponentials_ptr, losses_ptr, factors_ptr, residuals_ptr, scaled_ptr,
    hidden_stride, exponentials_stride, n_rows, width, n_tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    # Each row's loss; its factor s and what its target adds, p - 1; s * X, and a zero in E at its target.
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    inside = rows < n_rows
    total = tl.load(totals_ptr + rows, mask=inside, other=1.0)
    if tl.load(again_ptr + 1 + first // TILE_ROWS) != 0:
        total = _over_tiles(sums_ptr, rows, n_rows, n_tiles, TILES, False)
    class_ = tl.load(classes_ptr + rows, mask=inside, other=-1)
    chosen = tl.load(chosen_ptr + rows, mask=inside, other=0.0)
    shift = tl.load(shifts_ptr + rows, mask=inside, other=0.0)
    counts = class_ >= 0
    at_target = tl.exp(chosen - shift)
    # Summed in another order, the target's exponential in the sum may be below this one, and the loss below zero. A sum
    # that is not a number compares as false, and stays.
    total = tl.where(total < at_target, at_target, total)
    total = tl.where(counts, total, 1.0)
    loss = tl.where(counts, (shift - chosen) + tl.log(total), chosen)  # zero, or NaN where there is no such class
    tl.store(losses_ptr + rows, loss, mask=inside)
    if exponentials_ptr is not None:
        factor = tl.where(counts, 1.0 / total, 0.0)
        tl.store(factors_ptr + rows, factor, mask=inside)
        tl.store(residuals_ptr + rows, tl.where(counts, (at_target - total) / total, 0.0), mask=inside)
        at = exponentials_ptr + rows.to(tl.int64) * exponentials_stride + class_
        tl.store(at, tl.zeros((ROWS,), dtype=exponentials_ptr.dtype.element_ty), mask=inside & counts)
        if scaled_ptr is not None:
            wide = rows.to(tl.int64)[:, None]
            for start in range(0, width, BLOCK):
                cols = start + tl.arange(0, BLOCK)[None, :]
                mask = inside[:, None] & (cols < width)
                x = tl.load(hidden_ptr + wide * hidden_stride + cols, mask=mask, other=0.0).to(tl.float32)
                scaled = tl.where(counts[:, None], x * factor[:, None], 0.0)
                tl.store(scaled_ptr + wide * width + cols, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_VECTORS)
def linear_cross_entropy_hopper_fwd_hidden_kernel(
    raw_ptr, weight_ptr, classes_ptr, factors_ptr, residuals_ptr, n_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    # dX from E W, in place.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    class_ = tl.load(classes_ptr + rows, mask=rows < n_rows, other=-1).to(tl.int64)[:, None]
    factor = tl.load(factors_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
    residual = tl.load(residuals_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
    counts = class_ >= 0
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        mask = (rows < n_rows)[:, None] & (cols < width)
        raw = raw_ptr + rows.to(tl.int64)[:, None] * width + cols
        others = tl.load(raw, mask=mask, other=0.0).to(tl.float32) * factor
        target = tl.load(weight_ptr + class_ * width + cols, mask=mask & counts, other=0.0).to(tl.float32) * residual
        gradient = tl.where(counts, others + target, 0.0)  # whatever a row holds that does not count
        tl.store(raw, gradient.to(raw_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_VECTORS)
def linear_cross_entropy_hopper_fwd_runs_kernel(
    gradient_ptr, heads_ptr, tails_ptr, hidden_ptr, sorted_ptr, order_ptr, residuals_ptr, hidden_stride, n_rows, width,
    PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Adds to dW what targets add. `order` has rows of the same target behind each other; some places of it are a
    # program's. A run that begins and ends there is added at once; what there is of the others is kept, of one that
    # began before in `heads`, of one that goes on in `tails`.
    group = tl.program_id(0)
    first = group * PLACES
    places = first + tl.arange(0, PLACES)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = cols < width
    class_ = tl.load(sorted_ptr + places, mask=places < n_rows, other=-1)
    after = tl.load(sorted_ptr + places + 1, mask=places + 1 < n_rows, other=-2)
    rows = tl.load(order_ptr + places, mask=places < n_rows, other=0)
    residual = tl.load(residuals_ptr + rows, mask=places < n_rows, other=0.0)
    mask = (places < n_rows)[:, None] & inside
    x = tl.load(hidden_ptr + rows[:, None] * hidden_stride + cols, mask=mask, other=0.0).to(tl.float32)
    # At each place, what all of its run has here: a product with ones where two places are of the same run.
    same = class_[:, None] == class_[None, :]
    sums = tl.dot(same.to(tl.float32), x * residual[:, None], input_precision="ieee")

    began = class_ != tl.load(sorted_ptr + first - 1, mask=first > 0, other=-2)
    ends = (class_ != after) & (places < n_rows)
    is_last = (places == first + PLACES - 1) | (places == n_rows - 1)
    whole = (began & ends & (class_ >= 0))[:, None] & inside
    gradient = gradient_ptr + class_.to(tl.int64)[:, None] * width + cols
    tl.store(gradient, tl.load(gradient, mask=whole, other=0.0) + sums, mask=whole)
    kept = group.to(tl.int64) * width + cols + tl.zeros((PLACES, 1), dtype=tl.int64)
    tl.store(heads_ptr + kept, sums, mask=((began == 0) & (ends | is_last))[:, None] & inside)
    tl.store(tails_ptr + kept, sums, mask=(began & (ends == 0) & is_last)[:, None] & inside)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_VECTORS)
def linear_cross_entropy_hopper_fwd_ends_kernel(
    gradient_ptr, heads_ptr, tails_ptr, sorted_ptr, n_rows, width,
    PLACES: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Adds a run that goes on past the places of one program to dW: the program that has its beginning takes the rest.
    group = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = (group + 1) * PLACES
    class_ = tl.load(sorted_ptr + end - 1, mask=end < n_rows, other=-1)
    before = tl.load(sorted_ptr + group * PLACES - 1, mask=group > 0, other=-2)
    after = tl.load(sorted_ptr + end, mask=end < n_rows, other=-2)
    if (class_ >= 0) & (class_ == after) & (class_ != before):
        total = tl.load(tails_ptr + group.to(tl.int64) * width + cols, mask=cols < width, other=0.0)
        start = group + 1
        found = GROUPS
        while found == GROUPS:
            groups = start + tl.arange(0, GROUPS)
            same = tl.load(sorted_ptr + groups * PLACES, mask=groups * PLACES < n_rows, other=-1) == class_
            heads = heads_ptr + groups.to(tl.int64)[:, None] * width + cols[None, :]
            mask = same[:, None] & (cols < width)[None, :]
            total += tl.sum(tl.load(heads, mask=mask, other=0.0), axis=0)
            found = tl.sum(same.to(tl.int32), axis=0)
            start += GROUPS
        gradient = gradient_ptr + class_.to(tl.int64) * width + cols
        tl.store(gradient, tl.load(gradient, mask=cols < width, other=0.0) + total, mask=cols < width)


class _Chunks:
    """Rows of a call, some at a time, and what all chunks share.

    Args:
        hidden_states: [rows, width], as `takes` has them. weight: [vocab, width], likewise.
        targets, ignore_index: See `reference.linear_cross_entropy`.
        chunk_rows: Rows of all chunks but the last one.
    """

    def __init__(
        self, hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_rows: int
    ) -> None:
        (n_rows, width), vocab, device = hidden_states.shape, weight.shape[0], hidden_states.device
        self.hidden_states, self.weight, self.chunk_rows = hidden_states, weight, chunk_rows
        self.n_tiles = -(-vocab // hopper.CLASSES)
        self.classes = torch.empty(n_rows, dtype=torch.int32, device=device)
        self.chosen, self.shifts, self.factors, self.residuals = torch.empty(
            (4, n_rows), dtype=torch.float32, device=device
        ).unbind()
        self.partial = torch.empty((2, self.n_tiles * chunk_rows), dtype=torch.float32, device=device)
        self.totals = torch.empty(chunk_rows, dtype=torch.float32, device=device)
        # Of each chunk, whether the product is needed a second time, and for which blocks.
        chunks, blocks = -(-n_rows // chunk_rows), -(-chunk_rows // hopper.ROWS)
        self.again = torch.zeros((chunks, 1 + blocks), dtype=torch.int32, device=device)
        linear_cross_entropy_hopper_fwd_target_kernel[(triton.cdiv(n_rows, 8),)](
            hidden_states, weight, targets, self.classes, self.chosen, self.shifts,
            hidden_states.stride(0), targets.stride(0), n_rows, width, vocab, ignore_index,
            ROWS=8, BLOCK=256, FAR=_FAR, num_warps=4,
        )  # fmt: skip

    def exponentiate(self, rows: slice, out: Tensor | None, losses: Tensor, scaled: Tensor | None) -> None:
        """Fills `out` [rows, vocab] with E and `scaled` [rows, width] with s * X, if they are asked for, and `losses`;
        keeps s and p - 1 where there is `out`."""
        x, shifts, again = self.hidden_states[rows], self.shifts[rows], self.again[rows.start // self.chunk_rows]
        n_rows, width = x.shape
        sums, maxima = (values[: self.n_tiles * n_rows].view(self.n_tiles, n_rows) for values in self.partial)
        hopper.exponentiate(x, self.weight, shifts, out, sums, maxima, None)
        linear_cross_entropy_hopper_fwd_sum_kernel[(triton.cdiv(n_rows, 32),)](
            sums, maxima, shifts, self.totals, again, n_rows, self.n_tiles,
            ROWS=32, TILES=64, TILE_ROWS=hopper.ROWS, MOST=_MOST, num_warps=8,
        )  # fmt: skip
        hopper.exponentiate(x, self.weight, shifts, out, sums, maxima, again)
        linear_cross_entropy_hopper_fwd_rows_kernel[(triton.cdiv(n_rows, 8),)](
            x, self.classes[rows], self.chosen[rows], shifts, self.totals, sums, again,
            out, losses, self.factors[rows], self.residuals[rows], scaled,
            x.stride(0), 0 if out is None else out.stride(0), n_rows, width, self.n_tiles,
            ROWS=8, BLOCK=256, TILES=32, TILE_ROWS=hopper.ROWS, num_warps=4,
        )  # fmt: skip

    def finish_hidden(self, rows: slice, raw: Tensor) -> None:
        """Makes dX [rows, width] of E W, in place."""
        n_rows, width = raw.shape
        linear_cross_entropy_hopper_fwd_hidden_kernel[(triton.cdiv(n_rows, 8),)](
            raw, self.weight, self.classes[rows], self.factors[rows], self.residuals[rows], n_rows, width,
            ROWS=8, BLOCK=256, num_warps=4,
        )  # fmt: skip


def fill(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, buffer: Tensor | None, chunk_rows: int,
    losses: Tensor, raw_hidden: Tensor | None, raw_weight: Tensor | None,
) -> None:  # fmt: skip
    """Fills losses and gradients of their sum, as `triton_impl.losses_and_raw_gradients` has them.

    Args:
        hidden_states: [rows, width], as `takes` has them. weight: [vocab, width], likewise.
        targets, ignore_index: See `reference.linear_cross_entropy`.
        buffer: [chunk_rows, vocab] for exponentials, rows a multiple of 16 bytes apart; None if no gradient is asked
            for.
        chunk_rows: Rows of all chunks but the last one.
        losses: [rows] float32.
        raw_hidden: [rows, width]; None if not asked for.
        raw_weight: [vocab, width] float32; None if not asked for.
    """
    chunks = _Chunks(hidden_states, weight, targets, ignore_index, chunk_rows)
    for start in range(0, len(hidden_states), chunk_rows):
        rows = slice(start, min(start + chunk_rows, len(hidden_states)))
        left = None if buffer is None else buffer[: rows.stop - start]
        scaled = None
        if raw_weight is not None:  # it may lie where the hidden states' gradient goes then
            x = hidden_states[rows]
            scaled = torch.empty(x.shape, dtype=x.dtype, device=x.device) if raw_hidden is None else raw_hidden[rows]
        chunks.exponentiate(rows, left, losses[rows], scaled)
        if raw_weight is not None:
            assert left is not None
            assert scaled is not None
            add_product(raw_weight, left.T, scaled, first=start == 0)
        if raw_hidden is not None:
            assert left is not None
            torch.mm(left, weight, out=raw_hidden[rows])
            chunks.finish_hidden(rows, raw_hidden[rows])
    if raw_weight is not None:
        _add_targets(raw_weight, hidden_states, chunks.classes, chunks.residuals)


def _add_targets(raw_weight: Tensor, hidden_states: Tensor, classes: Tensor, residuals: Tensor) -> None:
    """Adds each row of the hidden states times its residual to the gradient of its class, unless that is -1."""
    n_rows, width = hidden_states.shape
    sorted_classes, order = classes.sort(stable=True)
    groups = triton.cdiv(n_rows, _PLACES)
    heads, tails = torch.empty((2, groups, width), dtype=torch.float32, device=raw_weight.device).unbind()
    linear_cross_entropy_hopper_fwd_runs_kernel[(groups, triton.cdiv(width, 128))](
        raw_weight, heads, tails, hidden_states, sorted_classes, order, residuals, hidden_states.stride(0),
        n_rows, width, PLACES=_PLACES, BLOCK=128, num_warps=8,
    )  # fmt: skip
    linear_cross_entropy_hopper_fwd_ends_kernel[(groups, triton.cdiv(width, 256))](
        raw_weight, heads, tails, sorted_classes, n_rows, width, PLACES=_PLACES, GROUPS=8, BLOCK=256, num_warps=4
    )
