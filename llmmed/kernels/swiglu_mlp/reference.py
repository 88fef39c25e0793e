"""The truth for `swiglu_mlp`."""

from __future__ import annotations

import torch
from torch import Tensor

from llmmed.kernels.swiglu import reference as swiglu


def swiglu_mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """y = swiglu(x gate_up_weight^T) down_weight^T (Shazeer 2020, arXiv:2002.05202, equation 6, without biases).

    Computed in the wider of float32 and the inputs' dtype and rounded once, at the end. An implementation may round
    gate, up and their product to the inputs' dtype.

    Args:
        x: [..., d_model], any float dtype.
        gate_up_weight: [2 d_ff, d_model] in x's dtype: the rows of the gate, then those of the other half.
        down_weight: [d_model, d_ff] in x's dtype.

    Returns:
        [..., d_model] in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    hidden = swiglu.swiglu(x.to(wide) @ gate_up_weight.to(wide).mT)
    return (hidden @ down_weight.to(wide).mT).to(x.dtype)
