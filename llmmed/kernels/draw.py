"""Dice for `Op.draw`: sizes at which kernels change what they do, and strides that a step might hand over."""

from __future__ import annotations

import random
from dataclasses import replace

from llmmed.kernels.base import TensorSpec

_BLOCKS = (8, 16, 32, 48, 64, 96, 128, 256, 384, 512, 1024)


def size(dice: random.Random, most: int, least: int = 1) -> int:
    """From `least` to `most`: as often as not a block's size or one beside it."""
    if dice.random() < 0.5:
        return dice.randint(least, most)
    near = [block + step for block in _BLOCKS for step in (-1, 0, 1) if least <= block + step <= most]
    return dice.choice(near or [most])


def rows(dice: random.Random) -> list[int]:
    """Of values: one dimension or two."""
    return [size(dice, 70)] if dice.random() < 0.7 else [size(dice, 5), size(dice, 20)]


def head_shape(dice: random.Random) -> tuple[int, int, int, int, int]:
    """Of attention: batch, seq, n_heads, n_kv_heads, head_dim. A single position has nothing to attend to."""
    batch, seq, head_dim = dice.randint(1, 2), size(dice, 140, least=2), 8 * dice.randint(1, 10)
    n_kv_heads = dice.randint(1, 3)
    return batch, seq, n_kv_heads * dice.randint(1, 3), n_kv_heads, head_dim


def apart(dice: random.Random, spec: TensorSpec) -> TensorSpec:
    """As it is, which is contiguous; or with rows of a wider tensor; or, of two dimensions, transposed."""
    *rows, width = spec.shape
    how = dice.choice(("contiguous", "contiguous", "apart", "transposed"))
    if how == "transposed" and len(rows) == 1:
        return replace(spec, stride=(1, rows[0]))
    if how == "contiguous" or not rows:
        return spec
    strides = [width + dice.choice((1, 3, 8, 32))]
    for count in reversed(rows[1:]):
        strides.insert(0, strides[0] * count)
    return replace(spec, stride=(*strides, 1))
