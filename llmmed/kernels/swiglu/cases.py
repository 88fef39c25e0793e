"""Inputs and costs of `swiglu`: what the gate tries, and the least that a call must do."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import torch

from llmmed.kernels.base import Call, Cost, Inputs, TensorSpec, tensor_spec
from llmmed.kernels.draw import apart, rows, size

REGIMES = ("bland", "saturated", "outliers", "row_scales")


def cases(dtype: torch.dtype) -> Mapping[str, Call]:
    """Small calls by name, for a compute dtype."""

    def spec(shape: tuple[int, ...], stride: tuple[int, ...] | None) -> TensorSpec:
        dense = tensor_spec(*shape, dtype=dtype, requires_grad=True)
        return dense if stride is None else replace(dense, stride=stride)

    def call(*shape: int, stride: tuple[int, ...] | None = None, up_stride: tuple[int, ...] | None = None) -> Call:
        return Call.of("swiglu", gate=spec(shape, stride), up=spec(shape, up_stride or stride))

    def fused(*shape: int, stride: tuple[int, ...] | None = None) -> Call:
        return Call.of("swiglu", gate=spec(shape, stride), up=None)

    return {
        "one row": call(1, 64),
        "fused": fused(3, 17, 192),
        "odd width": call(37, 97),
        "width one": call(5, 1),
        "three dimensions": call(3, 17, 192),
        "wide": call(3, 5000),
        "views of a fused projection": call(2, 19, 96, stride=(19 * 192, 192, 1)),
        "only one a view": call(33, 80, stride=(256, 1), up_stride=(80, 1)),
        "positions before sequences": call(2, 17, 48, stride=(48, 96, 1)),
        "transposed": call(40, 24, stride=(1, 40)),
        "fused, one row": fused(1, 128),
        "fused, odd width": fused(37, 194),
        "fused, width one": fused(5, 2),
        "fused, wide": fused(3, 10000),
        "fused, positions before sequences": fused(2, 17, 96, stride=(96, 192, 1)),
        "fused, transposed": fused(40, 48, stride=(1, 40)),
        "fused, rows apart": fused(33, 160, stride=(256, 1)),
    }


def draw(dice: random.Random, dtype: torch.dtype) -> Call:
    """A small call of random shapes and strides."""
    fused = dice.random() < 0.5
    plain = tensor_spec(*rows(dice), size(dice, 300) * (1 + fused), dtype=dtype, requires_grad=True)
    return Call.of("swiglu", gate=apart(dice, plain), up=None if fused else apart(dice, plain))


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `gate` and `up`.

    Regimes: `bland` normal values; `saturated` gates from -30 to 30, where the sigmoid is flat and its tail small;
    `outliers` one entry in a hundred 300 times larger; `row_scales` rows from 0.001 to 1,000.
    """
    is_fused = call["up"] is None
    gate_spec = call.spec("gate")
    shape = (*gate_spec.shape[:-1], gate_spec.shape[-1] // 2) if is_fused else gate_spec.shape

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    gate, up = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    if regime == "saturated":
        gate = 60 * uniform(*shape) - 30
    elif regime == "outliers":
        gate *= 1 + 299 * (uniform(*shape) < 0.01)
        up *= 1 + 299 * (uniform(*shape) < 0.01)
    elif regime == "row_scales":
        scales = 10 ** (6 * uniform(*shape[:-1], 1) - 3)
        gate, up = gate * scales, up / scales
    if is_fused:
        return {"gate": gate_spec.like(torch.cat((gate, up), dim=-1)), "up": None}
    return {"gate": gate_spec.like(gate), "up": call.spec("up").like(up)}


def cost(call: Call) -> Cost:
    """Forward reads both and writes one; backward reads both and the gradient and writes two."""
    both = sum(spec.nbytes for spec in call.tensors.values())
    return Cost(both * 3 // 2, both * 5 // 2)
