"""Inputs and costs of `swiglu`: what the gate tries, and the least that a call must do."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmmed.kernels.base import Call, Cost, Inputs, TensorSpec, tensor_spec

REGIMES = ("bland", "saturated", "outliers", "row_scales")


def cases(dtype: torch.dtype) -> Mapping[str, Call]:
    """Small calls by name, for a compute dtype."""

    def call(*shape: int, stride: tuple[int, ...] | None = None, up_stride: tuple[int, ...] | None = None) -> Call:
        gate = tensor_spec(*shape, dtype=dtype, requires_grad=True)
        if stride is not None:
            gate = TensorSpec(gate.shape, dtype, stride, requires_grad=True)
        up = gate if up_stride is None else TensorSpec(gate.shape, dtype, up_stride, requires_grad=True)
        return Call.of("swiglu", gate=gate, up=up)

    return {
        "one row": call(1, 64),
        "odd width": call(37, 97),
        "width one": call(5, 1),
        "three dimensions": call(3, 17, 192),
        "wide": call(3, 5000),
        "views of a fused projection": call(2, 19, 96, stride=(19 * 192, 192, 1)),
        "only one a view": call(33, 80, stride=(256, 1), up_stride=(80, 1)),
        "positions before sequences": call(2, 17, 48, stride=(48, 96, 1)),
        "transposed": call(40, 24, stride=(1, 40)),
    }


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `gate` and `up`.

    Regimes: `bland` normal values; `saturated` gates from -30 to 30, where the sigmoid is flat and its tail small;
    `outliers` one entry in a hundred 300 times larger; `row_scales` rows from 0.001 to 1,000.
    """
    gate_spec, up_spec = call.spec("gate"), call.spec("up")

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    gate, up = (torch.randn(spec.shape, generator=generator, device=device) for spec in (gate_spec, up_spec))
    if regime == "saturated":
        gate = 60 * uniform(*gate_spec.shape) - 30
    elif regime == "outliers":
        gate *= 1 + 299 * (uniform(*gate_spec.shape) < 0.01)
        up *= 1 + 299 * (uniform(*up_spec.shape) < 0.01)
    elif regime == "row_scales":
        scales = 10 ** (6 * uniform(*gate_spec.shape[:-1], 1) - 3)
        gate, up = gate * scales, up / scales
    return {"gate": gate_spec.like(gate), "up": up_spec.like(up)}


def cost(call: Call) -> Cost:
    """Forward reads both and writes one; backward reads both and the gradient and writes two."""
    nbytes = call.spec("gate").nbytes
    return Cost(3 * nbytes, 5 * nbytes)
