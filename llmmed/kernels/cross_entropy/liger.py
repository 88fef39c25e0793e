"""`cross_entropy` by Liger: an optional peer. It writes the gradient over the logits, so it is given a copy of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation, Unavailable


def _load() -> Callable[..., Any]:
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    except ImportError as error:
        raise Unavailable(f"Liger is not installed ({error}); pip install liger-kernel") from error
    if not torch.cuda.is_available():
        raise Unavailable("Liger's kernels need a CUDA GPU, and torch sees none")

    def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None = None) -> Tensor:
        """See `reference.cross_entropy`."""
        rows = logits.clone(memory_format=torch.contiguous_format)  # it writes into them, and takes no other strides
        loss: Tensor = LigerCrossEntropyFunction.apply(rows, targets, None, ignore_index)[0].float()
        return loss if scale is None else loss * scale

    return cross_entropy


IMPL = Implementation(
    "liger",
    load=_load,
    devices=("cuda",),
    compiles=False,  # it reads the number of targets back to the host
    kernel_names=("liger_cross_entropy_kernel",),
)
