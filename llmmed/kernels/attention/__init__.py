"""Causal self-attention with grouped queries."""

from llmmed.kernels.attention import cases, reference
from llmmed.kernels.base import Op

OP = Op(
    "attention",
    reference=reference.attention,
    differentiable=("q", "k", "v"),
    rows=("q", "k", "v"),
    cases=cases.cases,
    regimes=cases.REGIMES,
    make_inputs=cases.make_inputs,
    cost=cases.cost,
    draw=cases.draw,
)
