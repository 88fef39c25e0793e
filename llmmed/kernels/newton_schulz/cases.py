"""Inputs and costs of `newton_schulz`: what the gate tries, and the least that a call must do."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from llmmed.kernels.base import Call, Cost, Inputs, tensor_spec
from llmmed.kernels.draw import size

REGIMES = ("bland", "low_rank", "tiny", "scales")


def cases(dtype: torch.dtype) -> Mapping[str, Call]:
    """Small calls by name, for a compute dtype."""

    def call(*shape: int) -> Call:
        return Call.of("newton_schulz", G=tensor_spec(*shape, dtype=dtype))

    return {
        "square": call(2, 48, 48),
        "wide": call(3, 33, 97),
        "wide, aligned": call(2, 72, 168),
        "tall": call(2, 130, 40),
        "one matrix": call(1, 64, 64),
        "past a block": call(1, 140, 150),
    }


def draw(dice: random.Random, dtype: torch.dtype) -> Call:
    """A small call of random shapes and strides."""
    shape = (dice.randint(1, 3), size(dice, 160), size(dice, 160))
    return Call.of("newton_schulz", G=tensor_spec(*shape, dtype=dtype))


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `G`.

    Regimes: `bland` normal values; `low_rank` rank four and a little noise, as gradients are; `tiny` values of 1e-4;
    `scales` matrices of one batch from 0.01 to 100, which must not mix.
    """
    spec = call.spec("G")
    n, rows, cols = spec.shape

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    G = normal(n, rows, cols)
    if regime == "low_rank":
        G = normal(n, rows, 4) @ normal(n, 4, cols) + 0.05 * G
    elif regime == "tiny":
        G *= 1e-4
    elif regime == "scales":
        G *= 10 ** (4 * torch.rand((n, 1, 1), generator=generator, device=device) - 2)
    return {"G": spec.like(G)}


def cost(call: Call) -> Cost:
    """Reads and writes the matrices once. The fewest products known to be accurate: on the Gram matrix, restarted once.

    Twice the Gram matrix and twice the product with the wide matrix, fourteen products of small ones in between;
    symmetric results count once. Of square matrices that is what the iteration as it is written takes, too.
    """
    spec = call.spec("G")
    n, rows, cols = spec.shape
    small, large = min(rows, cols), max(rows, cols)
    return Cost(2 * spec.nbytes, 0, n * (6 * small * small * large + 14 * small**3), 0)
