"""The compute dtype behind `train.precision`. Parameters are float32 under every precision."""

from __future__ import annotations

import torch

PRECISION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of activations and of weights inside matrix products. Raises `KeyError` for an unknown precision."""
    return PRECISION_DTYPES[precision]
