"""Root-mean-square normalisation over the last dimension, with a learned weight."""

from llmmed.kernels.base import Op
from llmmed.kernels.rms_norm import cases, reference

OP = Op(
    "rms_norm",
    reference=reference.rms_norm,
    differentiable=("x", "weight"),
    rows=("x",),
    cases=cases.cases,
    regimes=cases.REGIMES,
    make_inputs=cases.make_inputs,
    cost=cases.cost,
    draw=cases.draw,
)
