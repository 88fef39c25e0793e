"""`swiglu` by Liger: an optional peer. Backward writes over the gate and the other half, so it is given copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation, Unavailable


def _load() -> Callable[..., Any]:
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        raise Unavailable(f"Liger is not installed ({error}); pip install liger-kernel") from error
    if not torch.cuda.is_available():
        raise Unavailable("Liger's kernels need a CUDA GPU, and torch sees none")

    def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
        """See `reference.swiglu`."""
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        # What is not contiguous Liger copies itself.
        y: Tensor = LigerSiLUMulFunction.apply(*(x.clone() if x.is_contiguous() else x for x in (gate, up)))
        return y

    return swiglu


IMPL = Implementation(
    "liger",
    load=_load,
    devices=("cuda",),
    compiles=False,  # Liger does not promise a graph without breaks
    kernel_names=("_swiglu_forward_kernel", "_swiglu_backward_kernel"),
)
