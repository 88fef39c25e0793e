"""Inputs and costs of `linear_cross_entropy`: what the gate tries, and the least that a call must do."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from llmmed.kernels.base import Call, Cost, Inputs, TensorSpec, tensor_spec
from llmmed.kernels.draw import apart, size

REGIMES = ("bland", "peaked", "flat", "far", "some_ignored", "all_ignored")

_SCALE = 340.5  # what `scale` holds where a call has one


def cases(dtype: torch.dtype) -> Mapping[str, Call]:
    """Small calls by name, for a compute dtype. The weight is float32, as the parameter is."""

    def call(
        rows: int, width: int, vocab: int, *, row_stride: int = 0, ignore_index: int = -100, scaled: bool = False
    ) -> Call:
        hidden_states = tensor_spec(rows, width, dtype=dtype, requires_grad=True)
        if row_stride:
            hidden_states = TensorSpec((rows, width), dtype, (row_stride, 1), requires_grad=True)
        return _call(hidden_states, vocab, ignore_index, scaled)

    return {
        "one row": call(1, 16, 64),
        "odd vocabulary": call(37, 24, 97),
        "odd width": call(20, 33, 1000, scaled=True),
        "many rows": call(130, 16, 100, scaled=True),
        "rows of a wider tensor": call(19, 32, 130, row_stride=64, ignore_index=0),
        "past a block": call(7, 16, 4099),
        "several tiles": call(130, 136, 300),
        "large vocabulary": call(3, 8, 33001),
    }


def draw(dice: random.Random, dtype: torch.dtype) -> Call:
    """A small call of random shapes and strides."""
    hidden_states = apart(dice, tensor_spec(size(dice, 70), size(dice, 160), dtype=dtype, requires_grad=True))
    vocab = size(dice, 400, least=2)
    return _call(hidden_states, vocab, ignore_index=dice.choice((-100, 0)), scaled=dice.choice((False, True)))


def _call(hidden_states: TensorSpec, vocab: int, ignore_index: int, scaled: bool) -> Call:
    rows, width = hidden_states.shape
    return Call.of(
        "linear_cross_entropy",
        hidden_states=hidden_states,
        weight=tensor_spec(vocab, width, dtype=torch.float32, requires_grad=True),
        targets=tensor_spec(rows, dtype=torch.int64),
        ignore_index=ignore_index,
        scale=tensor_spec(dtype=torch.float32) if scaled else None,
    )


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `hidden_states`, `weight`, `targets` and, where the call has one, `scale`.

    Regimes: `bland` logits of variance one; `peaked` ten times larger (a single row three), most targets being the
    likeliest class; `flat` logits around zero, where every gradient but the target's is close to 1 / vocab; `far`
    hidden states and classes with one large component in common, which moves a row's logits up to 100 from zero;
    `some_ignored` every third row ignored, the first and the last among them; `all_ignored`.
    """
    hidden_spec, weight_spec, ignore_index = call.spec("hidden_states"), call.spec("weight"), call["ignore_index"]
    assert isinstance(ignore_index, int)
    (rows, width), vocab = hidden_spec.shape, weight_spec.shape[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden_states, weight = normal(rows, width), normal(vocab, width) * width**-0.5
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    if regime == "peaked":
        hidden_states *= 10 if rows > 1 else 3  # a single row that saturates by chance leaves nothing to compare
        sure = torch.rand(rows, generator=generator, device=device) < 0.7
        targets = torch.where(sure, (hidden_states @ weight.T).argmax(-1), targets)
    elif regime == "flat":
        hidden_states *= 0.001
    elif regime == "far":
        hidden_states[:, 0] = 200 * torch.rand(rows, generator=generator, device=device) - 100
        hidden_states[0, 0] = 100
        weight[:, 0] = 1
    elif regime == "some_ignored":
        targets[::3] = ignore_index
        targets[-1] = ignore_index
    elif regime == "all_ignored":
        targets.fill_(ignore_index)
    scale = call["scale"]
    return {
        "hidden_states": hidden_spec.like(hidden_states),
        "weight": weight_spec.like(weight),
        "targets": call.spec("targets").like(targets),
        "ignore_index": ignore_index,
        "scale": scale.like(torch.tensor(_SCALE, device=device)) if isinstance(scale, TensorSpec) else None,
    }


def cost(call: Call) -> Cost:
    """Three products, of which only the logits' must happen forward; the inputs are read and both gradients written."""
    hidden_states, weight = call.spec("hidden_states"), call.spec("weight")
    product = 2 * hidden_states.numel * weight.shape[0]
    states = hidden_states.nbytes + weight.nbytes
    return Cost(states, 2 * states, product, 2 * product)


def parts(inputs: Inputs, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """The weight's gradient at classes that are targets and at the others, and the hidden states' in ignored rows: the
    first is far larger than the second where the softmax is flat, and hides its errors."""
    targets, counts = inputs["targets"], inputs["targets"] != inputs["ignore_index"]
    if name == "grad_weight":
        chosen = torch.zeros(tensor.shape[0], dtype=torch.bool, device=tensor.device)
        chosen[targets[counts]] = True
        masks = {"targets": chosen, "other classes": ~chosen}
    elif name == "grad_hidden_states":
        masks = {"rows that count": counts, "ignored rows": ~counts}
    else:
        masks = {}
    return {part: mask.unsqueeze(1).expand(tensor.shape) for part, mask in masks.items() if mask.any()}
