"""Inputs and costs of `attention`: what the gate tries, and the least that a call must do."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping

import torch

from llmmed.kernels.base import Call, Cost, Inputs, TensorSpec, heads_spec
from llmmed.kernels.draw import head_shape

REGIMES = ("bland", "peaked", "growing_keys")


def cases(dtype: torch.dtype) -> Mapping[str, Call]:
    """Small calls by name, for a compute dtype. Head sizes are multiples of 8, as every fused backend asks."""
    call = functools.partial(_call, dtype)
    return {
        "two positions": call(2, 2, 2, 2, 16),
        "odd length": call(2, 37, 2, 2, 32),
        "past a block": call(1, 131, 2, 2, 16),
        "head of 48": call(1, 70, 2, 2, 48),
        "head of 128": call(1, 65, 1, 1, 128),
        "grouped query": call(2, 45, 6, 2, 16),
        "views of a fused projection": call(2, 64, 4, 2, 32, fused=True),
    }


def draw(dice: random.Random, dtype: torch.dtype) -> Call:
    """A small call of random shapes and strides."""
    return _call(dtype, *head_shape(dice))


def _call(
    dtype: torch.dtype, batch: int, seq: int, n_heads: int, n_kv_heads: int, head_dim: int, fused: bool = False
) -> Call:
    row = (n_heads + 2 * n_kv_heads) * head_dim if fused else None
    q, k, v = (heads_spec(batch, seq, n, head_dim, dtype, row) for n in (n_heads, n_kv_heads, n_kv_heads))
    return Call.of("attention", q=q, k=k, v=v)


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `q`, `k` and `v`.

    Regimes: `bland` normal values; `peaked` queries ten times larger, so that a few keys take all the weight;
    `growing_keys` keys that grow with the position, so that the running maximum keeps changing. Both are milder where
    there are but two positions.
    """

    def normal(spec: TensorSpec) -> torch.Tensor:
        return torch.randn(spec.shape, generator=generator, device=device)

    specs = call.tensors
    q, k, v = (normal(specs[name]) for name in ("q", "k", "v"))
    if regime == "peaked":
        q *= 10 if q.size(1) > 2 else 2  # two positions that saturate leave nothing to compare
    elif regime == "growing_keys":
        k *= torch.linspace(0.1, 4 if k.size(1) > 2 else 2, k.size(1), device=device)[:, None, None]
    return {"q": specs["q"].like(q), "k": specs["k"].like(k), "v": specs["v"].like(v)}


def cost(call: Call) -> Cost:
    """Two products forward and five backward, over the causal half; q, k, v, the output and their gradients once."""
    q, k, v = call.spec("q"), call.spec("k"), call.spec("v")
    batch, seq, n_heads, head_dim = q.shape
    product = 2 * batch * n_heads * seq * seq * head_dim // 2
    states = 2 * q.nbytes + k.nbytes + v.nbytes
    return Cost(states, 2 * states, 2 * product, 5 * product)
