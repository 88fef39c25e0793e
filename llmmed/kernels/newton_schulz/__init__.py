"""Orthogonalisation of a batch of matrices by Newton-Schulz iterations: the heart of the Muon optimizer."""

from llmmed.kernels.base import Op
from llmmed.kernels.newton_schulz import cases, reference

OP = Op(
    "newton_schulz",
    reference=reference.newton_schulz,
    differentiable=(),
    rows=("G",),
    cases=cases.cases,
    regimes=cases.REGIMES,
    make_inputs=cases.make_inputs,
    cost=cases.cost,
    draw=cases.draw,
)
