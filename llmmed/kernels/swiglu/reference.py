"""The truth for `swiglu`."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """y = silu(gate) * up with silu(x) = x / (1 + exp(-x)), element by element (Shazeer 2020, arXiv:2002.05202).

    Computed in the wider of float32 and the inputs' dtype and rounded once, at the end.

    Args:
        gate: [..., d_ff], any float dtype; without `up` the fused projection `[gate | up]`, [..., 2 d_ff], whose
            gradient then is one tensor as well.
        up: As gate, or None.

    Returns:
        [..., d_ff] in gate's dtype.
    """
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    wide = torch.promote_types(gate.dtype, torch.float32)
    gate_wide = gate.to(wide)
    return (gate_wide * torch.sigmoid(gate_wide) * up.to(wide)).to(gate.dtype)
