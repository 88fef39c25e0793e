"""The default `newton_schulz`: batched products with their sums fused by cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.newton_schulz.reference import COEFFICIENTS, EPSILON, STEPS


def newton_schulz(G: Tensor) -> Tensor:
    """See `reference.newton_schulz`. Products in G's dtype."""
    a, b, c = COEFFICIENTS
    tall = G.size(-2) > G.size(-1)
    X = G.mT if tall else G
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    X = (X / (norm + EPSILON)).to(G.dtype)
    for _ in range(STEPS):
        A = torch.bmm(X, X.mT)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


IMPL = Implementation("pytorch", load=lambda: newton_schulz)
