"""`linear_cross_entropy` that keeps nothing between forward and backward: the logits are computed again, by chunks.

Four products instead of three. Between forward and backward no gradient of the weight is held, and a forward pass
without a backward one costs a single product.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.cross_entropy.triton_impl import mean_factor
from llmmed.kernels.linear_cross_entropy.triton_impl import KERNEL_NAMES, finish, losses_and_raw_gradients, tunables
from llmmed.kernels.operator import TRITON_DEVICES, make_operator, require_triton

_TUNABLES = tunables()


def _forward(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    factor = mean_factor(targets, ignore_index, scale)
    losses = losses_and_raw_gradients(hidden_states, weight, targets, ignore_index, False, False, _TUNABLES)[0]
    return (losses.sum() * factor).float(), factor


def _fake_forward(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return weight.new_empty((), dtype=torch.float32), weight.new_empty((), dtype=torch.float64)


def _backward(
    upstream: Tensor, hidden_states: Tensor, weight: Tensor, targets: Tensor, factor: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    _, hidden, raw_weight = losses_and_raw_gradients(
        hidden_states, weight, targets, ignore_index, True, True, _TUNABLES
    )
    out = raw_weight if weight.dtype == torch.float32 else torch.empty_like(raw_weight, dtype=weight.dtype)
    dtype = hidden_states.dtype
    return finish(hidden, hidden, upstream, factor, dtype), finish(raw_weight, out, upstream, factor, dtype)


def _fake_backward(
    upstream: Tensor, hidden_states: Tensor, weight: Tensor, targets: Tensor, factor: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return hidden_states.new_empty(hidden_states.shape), weight.new_empty(weight.shape)


_operator = make_operator(
    "llmmed::linear_cross_entropy_triton_recompute",
    forward=_forward,
    fake_forward=_fake_forward,
    backward=_backward,
    fake_backward=_fake_backward,
    save=lambda arguments, results: (*arguments[:3], results[1], arguments[3]),
    gradients=("hidden_states", "weight"),
)


def linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None
) -> Tensor:
    """See `reference.linear_cross_entropy`. The loss is NaN if a target is neither a class nor ignored."""
    loss: Tensor = _operator(hidden_states, weight, targets, ignore_index, scale)
    return loss


def _load() -> Callable[..., Any]:
    require_triton()
    return linear_cross_entropy


IMPL = Implementation(
    "triton_recompute",
    load=_load,
    devices=TRITON_DEVICES,
    kernel_names=KERNEL_NAMES,
    tunable=_TUNABLES,
)
