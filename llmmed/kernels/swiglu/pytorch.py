"""The default `swiglu`: written as the mathematics reads; a compiler fuses it into one kernel, eager mode does not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmmed.kernels.base import Implementation


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `reference.swiglu`. The activation is rounded to the inputs' dtype before the product."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


IMPL = Implementation("pytorch", load=lambda: swiglu)
