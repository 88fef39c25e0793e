"""The gated activation of Llama's feed-forward network."""

from llmmed.kernels.base import Op
from llmmed.kernels.swiglu import cases, reference

OP = Op(
    "swiglu",
    reference=reference.swiglu,
    differentiable=("gate", "up"),
    rows=("gate", "up"),
    cases=cases.cases,
    regimes=cases.REGIMES,
    make_inputs=cases.make_inputs,
    cost=cases.cost,
    draw=cases.draw,
)
