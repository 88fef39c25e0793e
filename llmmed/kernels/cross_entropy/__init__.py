"""Cross-entropy of logits against the index of the right class, averaged over the targets that count."""

from llmmed.kernels.base import Op
from llmmed.kernels.cross_entropy import cases, reference

OP = Op(
    "cross_entropy",
    reference=reference.cross_entropy,
    differentiable=("logits",),
    rows=("logits", "targets"),
    cases=cases.cases,
    regimes=cases.REGIMES,
    make_inputs=cases.make_inputs,
    cost=cases.cost,
    draw=cases.draw,
    parts=cases.parts,
)
