"""The default `swiglu`: written as the mathematics reads; a compiler fuses it into one kernel, eager mode does not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmmed.kernels.base import Implementation


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`. The activation is rounded to the inputs' dtype before the product."""
    return F.silu(gate) * up


IMPL = Implementation("pytorch", load=lambda: swiglu)
