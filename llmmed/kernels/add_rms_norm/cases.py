"""Inputs and costs of `add_rms_norm`: what the gate tries, and the least that a call must do."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from llmmed.kernels.base import Call, Cost, Inputs, TensorSpec, tensor_spec
from llmmed.kernels.draw import apart, rows, size

REGIMES = ("bland", "near_epsilon", "outliers", "row_scales", "small_branch", "far_weights")


def cases(dtype: torch.dtype) -> Mapping[str, Call]:
    """Small calls by name, for a compute dtype."""

    def call(
        *shape: int,
        stride: tuple[int, ...] | None = None,
        residual_stride: tuple[int, ...] | None = None,
        weight_stride: int = 1,
    ) -> Call:
        plain = tensor_spec(*shape, dtype=dtype, requires_grad=True)
        x, residual = (
            plain if s is None else TensorSpec(plain.shape, dtype, s, requires_grad=True)
            for s in (stride, residual_stride)
        )
        weight = TensorSpec((shape[-1],), torch.float32, (weight_stride,), requires_grad=True)
        return Call.of("add_rms_norm", x=x, residual=residual, weight=weight, eps=1e-6)

    return {
        "one row": call(1, 64),
        "odd width": call(37, 97),
        "width one": call(5, 1),
        "three dimensions": call(3, 17, 384),
        "many rows": call(1031, 64),
        "wide": call(3, 5000),
        "rows of a wider tensor": call(33, 96, stride=(256, 1)),
        "weight of every other element": call(5, 24, weight_stride=2),
        "residual in a wider tensor": call(33, 80, residual_stride=(192, 1)),
        "transposed": call(40, 24, stride=(1, 40)),
    }


def draw(dice: random.Random, dtype: torch.dtype) -> Call:
    """A small call of random shapes and strides."""
    plain = tensor_spec(*rows(dice), size(dice, 600), dtype=dtype, requires_grad=True)
    weight = tensor_spec(plain.shape[-1], dtype=torch.float32, requires_grad=True)
    return Call.of("add_rms_norm", x=apart(dice, plain), residual=apart(dice, plain), weight=weight, eps=1e-6)


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `x`, `residual` and `weight`.

    Regimes: `bland` normal values; `near_epsilon` a mean square around epsilon, where its place and presence show;
    `outliers` one entry in a hundred 300 times larger; `row_scales` rows from 0.001 to 1,000; `small_branch` a residual
    100 times larger than what is added to it, as in a deep model; `far_weights` weights from -30 to 30.
    """
    x_spec, residual_spec, weight_spec = (call.spec(name) for name in ("x", "residual", "weight"))
    eps = call["eps"]
    assert isinstance(eps, float)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, residual, weight = normal(*x_spec.shape), normal(*x_spec.shape), 1 + 0.1 * normal(*weight_spec.shape)
    if regime == "near_epsilon":
        x, residual = x * (eps / 2) ** 0.5, residual * (eps / 2) ** 0.5
    elif regime == "outliers":
        x *= 1 + 299 * (torch.rand(x.shape, generator=generator, device=device) < 0.01)
    elif regime == "row_scales":
        scales = 10 ** (6 * torch.rand((*x.shape[:-1], 1), generator=generator, device=device) - 3)
        x, residual = x * scales, residual * scales
    elif regime == "small_branch":
        residual *= 100
    elif regime == "far_weights":
        weight = 10 * normal(*weight_spec.shape)
    return {
        "x": x_spec.like(x), "residual": residual_spec.like(residual), "weight": weight_spec.like(weight), "eps": eps
    }  # fmt: skip


def cost(call: Call) -> Cost:
    """Forward reads two and writes two; backward reads the sum and both gradients and writes one, which x and the
    residual share. The weight is small beside them."""
    nbytes, weight = call.spec("x").nbytes, call.spec("weight").nbytes
    return Cost(4 * nbytes + weight, 4 * nbytes + 2 * weight)
