"""`linear_cross_entropy` in chunks of rows: cuBLAS for the products, Triton for what lies between them.

The logits of a chunk are turned into their gradient in place, which the other two products take up at once; the
weight's gradient is summed over the chunks in float32. Nothing waits for the host, so a CUDA graph can hold it.

On Hopper, in bfloat16, no pass over the logits lies between: the first product writes exponentials (`exponentials.py`).
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.cross_entropy.triton_impl import (
    Launch,
    held_columns,
    mean_factor,
    row_statistics,
    target_of,
    write_gradient,
    write_zeros,
)
from llmmed.kernels.cross_entropy.triton_impl import alternatives as row_alternatives
from llmmed.kernels.cross_entropy.triton_impl import launch as row_launch
from llmmed.kernels.linear_cross_entropy import exponentials
from llmmed.kernels.linear_cross_entropy.products import add_product
from llmmed.kernels.operator import (
    TRITON_DEVICES,
    as_rows,
    l2_bytes,
    make_operator,
    refuse_second_derivative,
    require_triton,
    sm_count,
    through_dispatcher,
)
from llmmed.kernels.tunable import Tunable

KERNEL_NAMES = (
    "linear_cross_entropy_triton_fwd_kernel",
    "linear_cross_entropy_hopper_fwd_kernel",
    "linear_cross_entropy_triton_bwd_kernel",
)
_CHUNKS = 2  # the logits of a chunk take half of what all would
_CHUNK_MIB = 576  # and no more than this, or a third more where two are then enough: each costs traffic of its own


class Chunk(NamedTuple):
    """What a chunk's logits may take, but for rows that fill its last tile; a third more if two then do for three."""

    mib: int


class Tunables(NamedTuple):
    """What an implementation in chunks may vary: the kernel between the products, and the chunks."""

    rows: Tunable[Launch]
    chunks: Tunable[Chunk]


def in_place_launch(device: torch.device, vocab: int, itemsize: int) -> Launch:
    """As in `cross_entropy`; but gradients in place leave the cache to the logits, so that two rows a multiprocessor
    may be under way where they take no more than half of it.
    """
    how = row_launch(device, vocab, itemsize)
    two_rows = 2 * sm_count(device) * vocab * itemsize
    if how.num_warps == 32 and how.per_sm == 1 and how.held == 0 and 2 * two_rows <= l2_bytes(device):
        return Launch(how.block // 2, how.stages, 16, 2, 0)
    return how


def tunables() -> Tunables:
    """A set of its own for each implementation: what is best for one need not be for another."""
    return Tunables(
        Tunable(
            "linear_cross_entropy_triton_fwd_kernel",
            lambda device, vocab, itemsize: in_place_launch(device, _padded_row(vocab), itemsize),
            lambda device, vocab, itemsize: row_alternatives(device, _padded_row(vocab), itemsize),
        ),
        Tunable(
            "chunks",
            lambda device, vocab, width, itemsize: Chunk(_CHUNK_MIB),
            lambda device, vocab, width, itemsize: (Chunk(_CHUNK_MIB // 2),),
        ),
    )


@triton.jit
def linear_cross_entropy_triton_fwd_kernel(
    logits_ptr, targets_ptr, losses_ptr, targets_stride, n_rows, ignore_index,
    V: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr,
    GRADIENT: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    # Losses of a chunk's rows, which begin PADDED apart; the logits become GAIN * (softmax - one_hot). As in
    # `cross_entropy`, a row is walked twice, the second time backwards and out of the cache.
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    target = target_of(targets_ptr, targets_stride, first, n_rows)
    for row in tl.range(first, n_rows, step):
        next_target = target_of(targets_ptr, targets_stride, row + step, n_rows)
        logits = logits_ptr + row * PADDED
        if target == ignore_index:
            tl.store(losses_ptr + row, 0.0)
            if GRADIENT:
                write_zeros(logits, PADDED, BLOCK)
        else:
            # A target that is no class must not read foreign memory: its loss is NaN, which nobody overlooks.
            is_class = (target >= 0) & (target < V)
            # Before the first walk, in which threads wait for each other: in the second one overwrites it.
            chosen = tl.load(logits + target, mask=is_class, other=float("nan")).to(tl.float32)
            held = held_columns(logits, V, PADDED, HELD)
            row_max, row_sum = row_statistics(logits, held, V, PADDED, BLOCK, STAGES, HELD, GRADIENT)
            tl.store(losses_ptr + row, (row_max - chosen) + tl.log(row_sum))
            if GRADIENT:
                write_gradient(
                    logits, logits, held, target, chosen, row_max, row_sum, GAIN, V, PADDED, BLOCK, STAGES, HELD
                )
        target = next_target


@triton.jit
def linear_cross_entropy_triton_bwd_kernel(
    raw_ptr, out_ptr, upstream_ptr, factor_ptr, n, BLOCK: tl.constexpr, GAIN: tl.constexpr
):
    factor = (tl.load(factor_ptr) * tl.load(upstream_ptr) / GAIN).to(tl.float32)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(raw_ptr + index, mask=index < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, (raw * factor).to(out_ptr.dtype.element_ty), mask=index < n)


def losses_and_raw_gradients(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    launches: Tunables,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss, and the gradients of their sum, chunk by chunk.

    Returns:
        Losses [rows] float32; the gradient of the hidden states in their dtype and of the weight in float32, both times
        `_gain`, each empty if it is not asked for. Divided by the rows that count, they might underflow in float16.
    """
    hidden_states, weight = as_rows(hidden_states), weight.to(hidden_states.dtype)
    n_rows, vocab = hidden_states.shape[0], weight.shape[0]
    losses = torch.empty(n_rows, dtype=torch.float32, device=weight.device)
    raw_hidden = torch.empty(hidden_states.shape if hidden_gradient else (0,), dtype=weight.dtype, device=weight.device)
    raw_weight = torch.empty(weight.shape if weight_gradient else (0,), dtype=torch.float32, device=weight.device)
    width, itemsize = hidden_states.shape[1], weight.element_size()
    most = launches.chunks(weight.device, vocab=vocab, width=width, itemsize=itemsize)
    row = _padded_row(vocab)
    chunk_rows = _chunk_rows(n_rows, row * itemsize, most)
    gradient = hidden_gradient or weight_gradient
    on_hopper = exponentials.takes(hidden_states, weight)
    buffer_rows = chunk_rows if gradient or not on_hopper else 0
    buffer = torch.empty((buffer_rows, row), dtype=weight.dtype, device=weight.device)
    if on_hopper:
        exponentials.fill(
            hidden_states, weight, targets, ignore_index, buffer[:, :vocab] if gradient else None, chunk_rows,
            losses, raw_hidden if hidden_gradient else None, raw_weight if weight_gradient else None,
        )  # fmt: skip
        return losses, raw_hidden, raw_weight
    how = launches.rows(weight.device, vocab=vocab, itemsize=itemsize)
    for start in range(0, n_rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, n_rows))
        logits = buffer[: rows.stop - start, :vocab]
        torch.mm(hidden_states[rows], weight.T, out=logits)
        _differentiate(logits, targets[rows], losses[rows], ignore_index, gradient, how)
        if hidden_gradient:
            torch.mm(logits, weight, out=raw_hidden[rows])
        if weight_gradient:
            add_product(raw_weight, logits.T, hidden_states[rows], first=start == 0)
    return losses, raw_hidden, raw_weight if n_rows else raw_weight.zero_()


def finish(raw: Tensor, out: Tensor, upstream: Tensor, factor: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Writes `raw` times the upstream gradient and the factor of the mean to `out`, which may be `raw` itself."""
    if raw.numel():
        linear_cross_entropy_triton_bwd_kernel[(triton.cdiv(raw.numel(), 4096),)](
            raw, out, upstream, factor, raw.numel(), BLOCK=4096, GAIN=_gain(compute_dtype), num_warps=8
        )
    return out


def _gain(compute_dtype: torch.dtype) -> float:
    """A probability of 1 / vocab is among float16's subnormal numbers; times 256 it is not."""
    return 256.0 if compute_dtype == torch.float16 else 1.0


def _padded_row(vocab: int) -> int:
    """Elements from one row of a chunk's logits to the next: whole lines of the cache where rows of the vocabulary
    itself would begin between 16 bytes, which takes every access apart, cuBLAS's too.
    """
    return vocab if vocab % 8 == 0 else -(-vocab // 64) * 64


def _chunk_rows(n_rows: int, row_bytes: int, most: Chunk) -> int:
    """Rows a chunk: in two chunks, or in as many as the memory budget asks for, all alike but for whole tiles."""
    total, budget = n_rows * row_bytes, most.mib * 2**20
    count = _CHUNKS if 3 * total <= 4 * _CHUNKS * budget else -(-total // budget)
    wanted = max(1, -(-n_rows // count))
    tile = 128 if wanted > 128 else 16
    return max(1, min(n_rows, -(-wanted // tile) * tile))


def _differentiate(
    logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, with_gradient: bool, how: Launch
) -> None:
    """Fills `losses` and turns `logits` into their gradient, in place."""
    n_rows, vocab = logits.shape
    linear_cross_entropy_triton_fwd_kernel[(how.programs(n_rows, logits.device),)](
        logits, targets, losses, targets.stride(0), n_rows, ignore_index,
        V=vocab, PADDED=logits.stride(0), BLOCK=how.block, STAGES=how.stages, HELD=how.held if with_gradient else 0,
        GRADIENT=with_gradient, GAIN=_gain(logits.dtype), num_warps=how.num_warps,
    )  # fmt: skip


_TUNABLES = tunables()


class _Direct(torch.autograd.Function):
    """Eager mode: forward computes the gradients but for a factor; the first backward pass finishes them in place."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None,
        hidden_gradient: bool, weight_gradient: bool,
    ) -> Tensor:  # fmt: skip
        loss, factor, *raw = _forward(
            hidden_states, weight, targets, ignore_index, scale, hidden_gradient, weight_gradient
        )
        ctx.save_for_backward(hidden_states, weight, targets, factor)
        ctx.ignore_index, ctx.raw = ignore_index, raw
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy (triton)")
        hidden_states, weight, targets, factor = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        raw, ctx.raw = ctx.raw, None
        if raw is None:  # a second pass over a retained graph: the first gave the buffers away
            _, *raw = losses_and_raw_gradients(
                hidden_states, weight, targets, ctx.ignore_index, wanted[0], wanted[1], _TUNABLES
            )
        raw_hidden, raw_weight = raw
        out_weight = raw_weight if weight.dtype == torch.float32 else torch.empty_like(raw_weight, dtype=weight.dtype)
        dtype = hidden_states.dtype
        gradients = (
            finish(raw_hidden, raw_hidden, upstream, factor, dtype) if wanted[0] else None,
            finish(raw_weight, out_weight, upstream, factor, dtype) if wanted[1] else None,
        )
        return *gradients, None, None, None, None, None


def _forward(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None,
    hidden_gradient: bool, weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    factor = mean_factor(targets, ignore_index, scale)
    losses, raw_hidden, raw_weight = losses_and_raw_gradients(
        hidden_states, weight, targets, ignore_index, hidden_gradient, weight_gradient, _TUNABLES
    )
    return (losses.sum() * factor).float(), factor, raw_hidden, raw_weight


def _fake_forward(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None,
    hidden_gradient: bool, weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        weight.new_empty((), dtype=torch.float32),
        weight.new_empty((), dtype=torch.float64),
        hidden_states.new_empty(hidden_states.shape if hidden_gradient else (0,)),
        weight.new_empty(weight.shape if weight_gradient else (0,), dtype=torch.float32),
    )


def _backward(
    upstream: Tensor, raw_hidden: Tensor, raw_weight: Tensor, factor: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out_hidden, out_weight = torch.empty_like(raw_hidden), torch.empty_like(raw_weight, dtype=weight_dtype)
    finish(raw_hidden, out_hidden, upstream, factor, raw_hidden.dtype)
    return out_hidden, finish(raw_weight, out_weight, upstream, factor, raw_hidden.dtype)


def _fake_backward(
    upstream: Tensor, raw_hidden: Tensor, raw_weight: Tensor, factor: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(raw_hidden), torch.empty_like(raw_weight, dtype=weight_dtype)


# Compiled graphs are functional: there backward writes the finished gradients to memory of their own.
_operator = make_operator(
    "llmmed::linear_cross_entropy_triton",
    forward=_forward,
    fake_forward=_fake_forward,
    backward=_backward,
    fake_backward=_fake_backward,
    save=lambda arguments, results: (results[2], results[3], results[1], arguments[1].dtype),
    gradients=("hidden_states", "weight"),
)


def linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None
) -> Tensor:
    """See `reference.linear_cross_entropy`. The loss is NaN if a target is neither a class nor ignored."""
    wanted = [tensor.requires_grad and torch.is_grad_enabled() for tensor in (hidden_states, weight)]
    apply = _operator if through_dispatcher(hidden_states) else _Direct.apply
    loss: Tensor = apply(hidden_states, weight, targets, ignore_index, scale, *wanted)
    return loss


def _load() -> Callable[..., Any]:
    require_triton()
    return linear_cross_entropy


IMPL = Implementation(
    "triton",
    load=_load,
    devices=TRITON_DEVICES,
    kernel_names=KERNEL_NAMES,
    tunable=_TUNABLES,
)
