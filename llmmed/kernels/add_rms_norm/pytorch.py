"""The default `add_rms_norm`: the sum, then whatever `rms_norm` the table holds."""

from __future__ import annotations

from torch import Tensor

from llmmed.kernels.base import Implementation, Kernels


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    new_residual = x + residual
    return kernels.rms_norm(new_residual, weight, eps), new_residual


IMPL = Implementation("pytorch", load=lambda: add_rms_norm, uses=("rms_norm",))
