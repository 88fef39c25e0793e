"""The truth for `swiglu`."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) * up with silu(x) = x / (1 + exp(-x)), element by element (Shazeer 2020, arXiv:2002.05202).

    Computed in the wider of float32 and the inputs' dtype and rounded once, at the end.

    Args:
        gate: [..., d_ff], any float dtype; may be a view of a fused projection.
        up: As gate.

    Returns:
        [..., d_ff] in gate's dtype.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    gate_wide = gate.to(wide)
    return (gate_wide * torch.sigmoid(gate_wide) * up.to(wide)).to(gate.dtype)
