"""The default `rotary`: written as the mathematics reads; a compiler fuses it into one kernel, eager mode does not."""

from __future__ import annotations

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.rotary`. Computed in float32."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


IMPL = Implementation("pytorch", load=lambda: rotary)
