"""The last projection and the cross-entropy of its logits in one, so that the logits need never exist as a whole."""

from llmmed.kernels.base import Op
from llmmed.kernels.linear_cross_entropy import cases, reference

OP = Op(
    "linear_cross_entropy",
    reference=reference.linear_cross_entropy,
    differentiable=("hidden_states", "weight"),
    rows=("hidden_states", "targets"),
    cases=cases.cases,
    regimes=cases.REGIMES,
    make_inputs=cases.make_inputs,
    cost=cases.cost,
    draw=cases.draw,
    parts=cases.parts,
)
