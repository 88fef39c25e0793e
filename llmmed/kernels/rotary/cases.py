"""Inputs and costs of `rotary`: what the gate tries, and the least that a call must do."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import replace

import torch

from llmmed.kernels.base import Call, Cost, Inputs, TensorSpec, heads_spec, tensor_spec
from llmmed.kernels.draw import size

REGIMES = ("bland", "outliers", "head_scales")


def cases(dtype: torch.dtype) -> Mapping[str, Call]:
    """Small calls by name, for a compute dtype."""
    call = functools.partial(_call, dtype)
    heads_first = call(2, 19, 3, 3, 32)
    strided = {n: replace(s, stride=(s.stride[0], 32, 19 * 32, 1)) for n, s in heads_first.tensors.items() if n in "qk"}
    return {
        "one position": call(1, 1, 2, 2, 16),
        "odd length": call(2, 33, 3, 3, 48),
        "smallest head": call(1, 7, 1, 1, 2),
        "odd half": call(2, 9, 2, 1, 22),
        "grouped query": call(2, 21, 6, 2, 64),
        "head of 128": call(1, 40, 2, 1, 128),
        "views of a fused projection": call(2, 17, 4, 2, 32, fused=True),
        "heads before positions": Call.of("rotary", **{**dict(heads_first.arguments), **strided}),
    }


def draw(dice: random.Random, dtype: torch.dtype) -> Call:
    """A small call of random shapes and strides."""
    batch, seq, head_dim = dice.randint(1, 3), size(dice, 140), 2 * dice.randint(1, 40)
    n_heads, n_kv_heads = dice.choices(range(1, 7), k=2)
    return _call(dtype, batch, seq, n_heads, n_kv_heads, head_dim)


def _call(
    dtype: torch.dtype, batch: int, seq: int, n_heads: int, n_kv_heads: int, head_dim: int, fused: bool = False
) -> Call:
    row = (n_heads + 2 * n_kv_heads) * head_dim if fused else None
    q, k = (heads_spec(batch, seq, n, head_dim, dtype, row) for n in (n_heads, n_kv_heads))
    table = tensor_spec(seq, head_dim // 2, dtype=torch.float32)
    return Call.of("rotary", q=q, k=k, cos=table, sin=table)


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `q` and `k`; `cos` and `sin` are the true tables of their positions, base 10,000.

    Regimes: `bland` normal values; `outliers` one entry in a hundred 300 times larger; `head_scales` heads from 0.01 to
    100, so that a swap of heads or halves shows.
    """

    def states(spec: TensorSpec) -> torch.Tensor:
        x = torch.randn(spec.shape, generator=generator, device=device)
        if regime == "outliers":
            x *= 1 + 299 * (torch.rand(x.shape, generator=generator, device=device) < 0.01)
        elif regime == "head_scales":
            x *= 10 ** (4 * torch.rand((*x.shape[:2], x.shape[2], 1), generator=generator, device=device) - 2)
        return spec.like(x)

    seq, half = call.spec("cos").shape
    frequencies = 10_000.0 ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float64), frequencies)
    return {
        "q": states(call.spec("q")),
        "k": states(call.spec("k")),
        "cos": call.spec("cos").like(angles.cos()),
        "sin": call.spec("sin").like(angles.sin()),
    }


def cost(call: Call) -> Cost:
    """Each direction reads q and k and writes both; the tables are small and shared by batch and heads."""
    states = call.spec("q").nbytes + call.spec("k").nbytes
    tables = call.spec("cos").nbytes + call.spec("sin").nbytes
    return Cost(2 * states + tables, 2 * states + tables)
