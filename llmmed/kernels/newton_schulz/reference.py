"""The truth for `newton_schulz`."""

from __future__ import annotations

from torch import Tensor

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of the quintic; Jordan et al. 2024
EPSILON = 1e-7  # keeps a matrix of zeros finite


def newton_schulz(G: Tensor) -> Tensor:
    """Pushes the singular values of every matrix towards one: five steps of X <- a X + (b A + c A^2) X, A = X X^T.

    The quintic iteration of Muon (Jordan et al. 2024, as in `torch.optim.Muon`), on X = G / (|G|_F + epsilon). It does
    not converge to one but to about [0.7, 1.2], by design: steep at zero. Computed on the smaller side of the matrix,
    which changes nothing but the cost.

    Args:
        G: [n_matrices, rows, cols], any float dtype.

    Returns:
        The same shape and dtype.
    """
    a, b, c = COEFFICIENTS
    X = G.mT if G.size(-2) > G.size(-1) else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + EPSILON)
    for _ in range(STEPS):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    result: Tensor = X.mT if G.size(-2) > G.size(-1) else X
    return result
