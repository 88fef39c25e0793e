"""Inputs and costs of `cross_entropy`: what the gate tries, and the least that a call must do."""

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
    """Small calls by name, for a compute dtype."""

    def call(rows: int, vocab: int, *, row_stride: int = 0, ignore_index: int = -100, scaled: bool = False) -> Call:
        logits = tensor_spec(rows, vocab, dtype=dtype, requires_grad=True)
        if row_stride:
            logits = TensorSpec(logits.shape, dtype, (row_stride, 1), requires_grad=True)
        return _call(logits, ignore_index, scaled)

    transposed = call(24, 40).to_json()
    transposed["arguments"]["logits"]["stride"] = (1, 24)
    return {
        "one row": call(1, 64),
        "odd vocabulary": call(37, 97),
        "two classes": call(5, 2),
        "a padded table": call(19, 1000, row_stride=1024, scaled=True),
        "ignoring a class": call(23, 130, ignore_index=0),
        "past a block": call(9, 4099, scaled=True),
        "large vocabulary": call(3, 33001),
        "transposed": Call.from_json(transposed),
    }


def draw(dice: random.Random, dtype: torch.dtype) -> Call:
    """A small call of random shapes and strides."""
    logits = apart(dice, tensor_spec(size(dice, 70), size(dice, 600, least=2), dtype=dtype, requires_grad=True))
    return _call(logits, ignore_index=dice.choice((-100, 0)), scaled=dice.choice((False, True)))


def _call(logits: TensorSpec, ignore_index: int, scaled: bool) -> Call:
    return Call.of(
        "cross_entropy",
        logits=logits,
        targets=tensor_spec(logits.shape[0], dtype=torch.int64),
        ignore_index=ignore_index,
        scale=tensor_spec(dtype=torch.float32) if scaled else None,
    )


def make_inputs(call: Call, regime: str, generator: torch.Generator, device: torch.device) -> Inputs:
    """Draws `logits`, `targets` and, where the call has one, `scale`.

    Regimes: `bland` normal logits; `peaked` logits ten times larger (of a single row three), most targets being the
    likeliest class; `flat` logits around zero, where every gradient but the target's is close to 1 / vocab; `far` rows
    that lie up to 80 from zero, where an exponential without the maximum taken off overflows; `some_ignored` every
    third row ignored, the first and the last among them; `all_ignored`.
    """
    logits_spec, targets_spec, ignore_index = call.spec("logits"), call.spec("targets"), call["ignore_index"]
    assert isinstance(ignore_index, int)
    rows, vocab = logits_spec.shape
    logits = torch.randn((rows, vocab), generator=generator, device=device)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    if regime == "peaked":
        logits *= 10 if rows > 1 else 3  # a single row that saturates by chance leaves nothing to compare
        sure = torch.rand(rows, generator=generator, device=device) < 0.7
        targets = torch.where(sure, logits.argmax(-1), targets)
    elif regime == "flat":
        logits *= 0.001
    elif regime == "far":
        logits += 160 * torch.rand((rows, 1), generator=generator, device=device) - 80
        logits[0] += 100 - logits[0].mean()
    elif regime == "some_ignored":
        targets[::3] = ignore_index
        targets[-1] = ignore_index
    elif regime == "all_ignored":
        targets.fill_(ignore_index)
    scale = call["scale"]
    return {
        "logits": logits_spec.like(logits),
        "targets": targets_spec.like(targets),
        "ignore_index": ignore_index,
        "scale": scale.like(torch.tensor(_SCALE, device=device)) if isinstance(scale, TensorSpec) else None,
    }


def cost(call: Call) -> Cost:
    """The logits are read once and their gradient is written once; which direction does which is free.

    About five operations an element: two exponentials, their arguments and a sum.
    """
    logits = call.spec("logits")
    return Cost(logits.nbytes, logits.nbytes, 3 * logits.numel, 2 * logits.numel)


def parts(inputs: Inputs, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """The gradient at the targets, elsewhere, and in ignored rows: the first is `vocab` times larger than the second
    where the softmax is flat, and hides its errors."""
    if name != "grad_logits":
        return {}
    targets = inputs["targets"]
    counts = (targets != inputs["ignore_index"]).unsqueeze(1)
    at_target = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
    at_target.scatter_(1, torch.where(counts, targets.unsqueeze(1), 0), counts)
    masks = {
        "targets": at_target,
        "other classes": counts & ~at_target,
        "ignored rows": (~counts).expand(tensor.shape),
    }
    return {part: mask for part, mask in masks.items() if mask.any()}
