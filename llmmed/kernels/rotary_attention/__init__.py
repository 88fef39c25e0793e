"""Rotary position embedding and causal self-attention of one fused projection, as one op."""

from llmmed.kernels.base import Op
from llmmed.kernels.rotary_attention import cases, reference

OP = Op(
    "rotary_attention",
    reference=reference.rotary_attention,
    differentiable=("qkv",),
    rows=("qkv",),
    cases=cases.cases,
    regimes=cases.REGIMES,
    make_inputs=cases.make_inputs,
    cost=cases.cost,
    draw=cases.draw,
    parts=cases.parts,
)
