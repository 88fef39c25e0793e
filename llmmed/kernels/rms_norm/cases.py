"""Inputs and costs of `rms_norm`: what the gate tries, and the least that a call must do."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from llmmed.kernels.base import Call, Cost, Inputs, TensorSpec, tensor_spec
from llmmed.kernels.draw import apart, rows, size

REGIMES = ("bland", "near_epsilon", "outliers", "row_scales", "far_weights")


def cases(dtype: torch.dtype) -> Mapping[str, Call]:
    """Small calls by name, for a compute dtype."""

    def call(*shape: int, stride: tuple[int, ...] | None = None, weight_stride: int = 1, eps: float = 1e-6) -> Call:
        x = tensor_spec(*shape, dtype=dtype, requires_grad=True)
        if stride is not None:
            x = TensorSpec(x.shape, dtype, stride, requires_grad=True)
        weight = TensorSpec((shape[-1],), torch.float32, (weight_stride,), requires_grad=True)
        return Call.of("rms_norm", x=x, weight=weight, eps=eps)

    return {
        "one row": call(1, 64),
        "odd width": call(37, 97),
        "width one": call(5, 1, eps=0.5),  # with a small one the gradient of x is all cancellation
        "three dimensions": call(3, 17, 384),
        "many rows": call(1031, 64),
        "wide": call(3, 5000),
        "rows of a wider tensor": call(33, 96, stride=(256, 1)),
        "weight of every other element": call(5, 24, weight_stride=2),
        "transposed": call(40, 24, stride=(1, 40)),
    }


def draw(dice: random.Random, dtype: torch.dtype) -> Call:
    """A small call of random shapes and strides."""
    x = apart(dice, tensor_spec(*rows(dice), size(dice, 600), dtype=dtype, requires_grad=True))
    weight = tensor_spec(x.shape[-1], dtype=torch.float32, requires_grad=True)
    return Call.of("rms_norm", x=x, weight=weight, eps=1e-6)


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `x` and `weight`.

    Regimes: `bland` normal values; `near_epsilon` a mean square around epsilon, where its place and presence show;
    `outliers` one entry in a hundred 300 times larger; `row_scales` rows from 0.001 to 1,000; `far_weights` weights
    from -30 to 30 instead of around one.
    """
    x_spec, weight_spec, eps = call.spec("x"), call.spec("weight"), call["eps"]
    assert isinstance(eps, float)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, weight = normal(*x_spec.shape), 1 + 0.1 * normal(*weight_spec.shape)
    if regime == "near_epsilon":
        x *= eps**0.5
    elif regime == "outliers":
        x *= 1 + 299 * (torch.rand(x.shape, generator=generator, device=device) < 0.01)
    elif regime == "row_scales":
        x *= 10 ** (6 * torch.rand((*x.shape[:-1], 1), generator=generator, device=device) - 3)
    elif regime == "far_weights":
        weight = 10 * normal(*weight_spec.shape)
    return {"x": x_spec.like(x), "weight": weight_spec.like(weight), "eps": eps}


def cost(call: Call) -> Cost:
    """Forward reads x and writes y; backward reads x and dy and writes dx. The weight is small beside them."""
    x, weight = call.spec("x"), call.spec("weight")
    return Cost(2 * x.nbytes + weight.nbytes, 3 * x.nbytes + 2 * weight.nbytes)
