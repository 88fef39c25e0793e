"""Llama's feed-forward network as one op: the gated activation with the products on both of its sides."""

from llmmed.kernels.base import Op
from llmmed.kernels.swiglu_mlp import cases, reference

OP = Op(
    "swiglu_mlp",
    reference=reference.swiglu_mlp,
    differentiable=("x", "gate_up_weight", "down_weight"),
    rows=("x",),
    cases=cases.cases,
    regimes=cases.REGIMES,
    make_inputs=cases.make_inputs,
    cost=cases.cost,
    draw=cases.draw,
    parts=cases.parts,
)
