"""Inputs and costs of `swiglu_mlp`: what the gate tries, and the least that a call must do."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llmmed.kernels.base import Call, Cost, Inputs, TensorSpec, tensor_spec
from llmmed.kernels.draw import apart, rows, size

REGIMES = ("bland", "saturated", "row_scales")


def cases(dtype: torch.dtype) -> Mapping[str, Call]:
    """Small calls by name, for a compute dtype. The weights are in it, too."""

    def call(*rows: int, d_model: int, d_ff: int, row_stride: int = 0) -> Call:
        x = tensor_spec(*rows, d_model, dtype=dtype, requires_grad=True)
        if row_stride:
            x = replace(x, stride=(row_stride, 1))
        return _call(x, d_ff)

    return {
        "one row": call(1, d_model=16, d_ff=24),
        "odd width": call(37, d_model=33, d_ff=40),
        "odd hidden width": call(20, d_model=32, d_ff=37),
        "past a block": call(131, d_model=136, d_ff=72),
        "whole blocks of hidden units": call(131, d_model=136, d_ff=256),
        "three dimensions, many blocks of rows": call(3, 100, d_model=16, d_ff=136),
        "long sum": call(70, d_model=1032, d_ff=128),
        "long sum, part of a block of hidden units": call(9, d_model=1032, d_ff=40),
        "long sum, odd hidden width": call(9, d_model=1032, d_ff=37),
        "rows of a wider tensor": call(19, d_model=32, d_ff=48, row_stride=64),
    }


def draw(dice: random.Random, dtype: torch.dtype) -> Call:
    """A small call of random shapes and strides."""
    d_model, d_ff = size(dice, 150), size(dice, 150)
    return _call(apart(dice, tensor_spec(*rows(dice), d_model, dtype=dtype, requires_grad=True)), d_ff)


def _call(x: TensorSpec, d_ff: int) -> Call:
    d_model = x.shape[-1]
    return Call.of(
        "swiglu_mlp",
        x=x,
        gate_up_weight=tensor_spec(2 * d_ff, d_model, dtype=x.dtype, requires_grad=True),
        down_weight=tensor_spec(d_model, d_ff, dtype=x.dtype, requires_grad=True),
    )


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `x` and both weights, so that gate, up and the result have a variance around one.

    Regimes: `bland`; `saturated` gates from -30 to 30, where the sigmoid is flat and its tail small; `row_scales` rows
    of `x` from 0.01 to 10.
    """
    x_spec, gate_up_spec, down_spec = (call.spec(name) for name in ("x", "gate_up_weight", "down_weight"))
    d_model, d_ff = down_spec.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, gate_up, down = normal(*x_spec.shape), normal(*gate_up_spec.shape), normal(*down_spec.shape)
    gate_up, down = gate_up * d_model**-0.5, down * (d_ff / 3) ** -0.5
    if regime == "saturated":
        gate_up[:d_ff] *= 10
    elif regime == "row_scales":
        x *= 10 ** (3 * torch.rand((*x_spec.shape[:-1], 1), generator=generator, device=device) - 2)
    return {"x": x_spec.like(x), "gate_up_weight": gate_up_spec.like(gate_up), "down_weight": down_spec.like(down)}


def cost(call: Call) -> Cost:
    """Two products forward and four backward; every argument read and every result written once."""
    x, down = call.spec("x"), call.spec("down_weight")
    states, weights = x.nbytes, call.spec("gate_up_weight").nbytes + down.nbytes
    products = 3 * 2 * x.numel * down.shape[1]  # gate, up, down
    return Cost(2 * states + weights, 3 * states + 2 * weights, products, 2 * products)


def parts(inputs: Inputs, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """The weight's gradients of gate and up, which lie in one tensor and differ in size."""
    if name != "grad_gate_up_weight":
        return {}
    row = torch.arange(tensor.shape[0], device=tensor.device)[:, None].expand(tensor.shape)
    d_ff = tensor.shape[0] // 2
    return {"gate": row < d_ff, "up": row >= d_ff}
