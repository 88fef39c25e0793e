"""Inputs and costs of `rotary_attention`: what the gate tries, and the least that a call must do."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping

import torch
from torch import Tensor

from llmmed.kernels.base import Call, Cost, Inputs, heads_spec, tensor_spec
from llmmed.kernels.draw import head_shape

REGIMES = ("bland", "peaked", "growing_keys")


def cases(dtype: torch.dtype) -> Mapping[str, Call]:
    """Small calls by name, for a compute dtype. Head sizes are multiples of 8, as every fused backend asks."""
    call = functools.partial(_call, dtype)
    return {
        "odd length": call(2, 37, 2, 1, 32),
        "two positions": call(2, 2, 2, 2, 16),
        "past a block": call(1, 131, 2, 2, 16),
        "whole blocks, grouped query": call(1, 384, 4, 2, 64),
        "head of 48": call(1, 70, 2, 2, 48),
        "smallest head": call(1, 33, 2, 1, 8),
        "head of 128": call(1, 65, 1, 1, 128),
        "grouped query": call(2, 45, 6, 2, 16),
        "view of a wider tensor": call(2, 64, 4, 2, 32, wider=24),
    }


def draw(dice: random.Random, dtype: torch.dtype) -> Call:
    """A small call of random shapes and strides."""
    return _call(dtype, *head_shape(dice), wider=dice.choice((0, 0, 8, 24)))


def _call(
    dtype: torch.dtype, batch: int, seq: int, n_heads: int, n_kv_heads: int, head_dim: int, wider: int = 0
) -> Call:
    heads = n_heads + 2 * n_kv_heads
    qkv = heads_spec(batch, seq, heads, head_dim, dtype, heads * head_dim + wider)  # of a tensor with more columns
    table = tensor_spec(seq, head_dim // 2, dtype=torch.float32)
    return Call.of("rotary_attention", qkv=qkv, cos=table, sin=table, n_heads=n_heads)


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `qkv`; `cos` and `sin` are the true tables of their positions, base 10,000.

    Regimes: `bland` normal values; `peaked` queries ten times larger, so that a few keys take all the weight;
    `growing_keys` keys that grow with the position, so that the running maximum keeps changing. Both are milder where
    there are but two positions.
    """
    spec = call.spec("qkv")
    n_heads, n_kv_heads = _heads(call)
    qkv = torch.randn(spec.shape, generator=generator, device=device)
    if regime == "peaked":
        qkv[:, :, :n_heads] *= 10 if spec.shape[1] > 2 else 2  # two positions that saturate leave nothing to compare
    elif regime == "growing_keys":
        growth = torch.linspace(0.1, 4 if spec.shape[1] > 2 else 2, spec.shape[1], device=device)[:, None, None]
        qkv[:, :, n_heads : n_heads + n_kv_heads] *= growth
    seq, half = call.spec("cos").shape
    frequencies = 10_000.0 ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float64), frequencies)
    return {
        "qkv": spec.like(qkv),
        "cos": call.spec("cos").like(angles.cos()),
        "sin": call.spec("sin").like(angles.sin()),
        "n_heads": n_heads,
    }


def cost(call: Call) -> Cost:
    """Two products forward and five backward, over the causal half; the projection, the output and their gradients
    once. The tables are small and shared by batch and heads."""
    qkv = call.spec("qkv")
    batch, seq, heads, head_dim = qkv.shape
    n_heads, _ = _heads(call)
    product = 2 * batch * n_heads * seq * seq * head_dim // 2
    out = qkv.nbytes // heads * n_heads
    tables = call.spec("cos").nbytes + call.spec("sin").nbytes
    return Cost(qkv.nbytes + out + tables, 2 * (qkv.nbytes + out) + tables, 2 * product, 5 * product)


def parts(inputs: Inputs, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """The gradients of queries, keys and values, which lie in one tensor and differ in size."""
    if name != "grad_qkv":
        return {}
    head = torch.arange(tensor.size(2), device=tensor.device)[:, None].expand(tensor.shape)
    n_heads = inputs["n_heads"]
    n_kv_heads = (tensor.size(2) - n_heads) // 2
    return {
        "queries": head < n_heads,
        "keys": (head >= n_heads) & (head < n_heads + n_kv_heads),
        "values": head >= n_heads + n_kv_heads,
    }


def _heads(call: Call) -> tuple[int, int]:
    n_heads = call["n_heads"]
    assert isinstance(n_heads, int)
    return n_heads, (call.spec("qkv").shape[2] - n_heads) // 2
