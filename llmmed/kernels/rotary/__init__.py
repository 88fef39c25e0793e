"""Rotary position embedding of queries and keys."""

from llmmed.kernels.base import Op
from llmmed.kernels.rotary import cases, reference

OP = Op(
    "rotary",
    reference=reference.rotary,
    differentiable=("q", "k"),
    rows=("q", "k"),
    cases=cases.cases,
    regimes=cases.REGIMES,
    make_inputs=cases.make_inputs,
    cost=cases.cost,
    draw=cases.draw,
)
