"""The default `swiglu_mlp`: two matrix products, and whichever `swiglu` is chosen between them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmmed.kernels.base import Implementation, Kernels


def swiglu_mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, *, kernels: Kernels) -> Tensor:
    """See `reference.swiglu_mlp`."""
    return F.linear(kernels.swiglu(F.linear(x, gate_up_weight)), down_weight)


IMPL = Implementation("pytorch", load=lambda: swiglu_mlp, uses=("swiglu",))
