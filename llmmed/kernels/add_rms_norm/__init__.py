"""The residual addition and the root-mean-square normalisation of its sum, as one op."""

from llmmed.kernels.add_rms_norm import cases, reference
from llmmed.kernels.base import Op

OP = Op(
    "add_rms_norm",
    reference=reference.add_rms_norm,
    differentiable=("x", "residual", "weight"),
    rows=("x", "residual"),
    cases=cases.cases,
    regimes=cases.REGIMES,
    make_inputs=cases.make_inputs,
    cost=cases.cost,
    draw=cases.draw,
)
