"""Where a training step's time goes, from the plan's evidence alone: what each op takes by itself, and the rest.

An op built from others (`Implementation.uses`) is timed with its parts, so those calls of a part count with it alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from llmmed.autotune.plan import KernelPlan
from llmmed.kernels.base import Unavailable
from llmmed.kernels.catalog import DEFAULT, get_implementation, get_op

REST = "everything else"


@dataclass(frozen=True)
class Part:
    """One op with one implementation, all its calls."""

    op: str
    implementation: str
    ms: float


@dataclass(frozen=True)
class Breakdown:
    """A step under one choice of kernels, or a micro-batch where no step was measured, as `whole` says; times in ms.

    `step_ms` is the whole, measured in the real step, None where that was not measured. `rest_ms` is what the ops do
    not account for: products, embedding, the optimizer; None without a whole, or where the ops, timed one by one,
    take longer than the step in which a compiler joins them. `untimed` are ops without a time.
    """

    parts: tuple[Part, ...]
    step_ms: float | None
    untimed: tuple[str, ...]

    @property
    def whole(self) -> str:
        """What the times are of."""
        return "micro-batch" if self.step_ms is None else "step"

    @property
    def ops_ms(self) -> float:
        return sum(part.ms for part in self.parts)

    @property
    def rest_ms(self) -> float | None:
        return None if self.step_ms is None or self.step_ms < self.ops_ms else self.step_ms - self.ops_ms


def of_chosen(plan: KernelPlan) -> Breakdown:
    """With the kernels that were chosen."""
    return _breakdown(plan, plan.choice, plan.step.chosen.ms if plan.step else None)


def of_default(plan: KernelPlan) -> Breakdown:
    """With PyTorch's kernels, or what was pinned in their place."""
    choice = plan.step.default.choice if plan.step else dict.fromkeys(plan.ops, DEFAULT)
    return _breakdown(plan, choice, plan.step.default.ms if plan.step else None)


def _breakdown(plan: KernelPlan, choice: Mapping[str, str], step_ms: float | None) -> Breakdown:
    own = _own_shares(plan)
    micro_batches = plan.step.micro_batches if plan.step else 1
    parts, untimed = [], []
    for name, op in plan.ops.items():
        implementation = choice.get(name, op.chosen)
        candidate = op.candidates.get(implementation)
        if own[name] == 0:
            continue
        if candidate is None or candidate.total_ms is None:
            untimed.append(name)
        else:
            passes = 1 if _is_of_the_optimizer(name) else micro_batches
            parts.append(Part(name, implementation, candidate.total_ms * own[name] * passes))
    return Breakdown(tuple(sorted(parts, key=lambda part: -part.ms)), step_ms, tuple(untimed))


def _own_shares(plan: KernelPlan) -> dict[str, float]:
    """The share of each op's calls that no other op makes."""
    calls = {name: sum(call.count for call in op.calls) for name, op in plan.ops.items()}
    inside: Counter[str] = Counter()
    for name, count in calls.items():
        for part in _parts_of(name):
            inside[part] += count
    return {name: max(0, count - inside[name]) / count if count else 0.0 for name, count in calls.items()}


def _is_of_the_optimizer(op: str) -> bool:
    """Whether an op is called once a step, after all micro-batches: it has no backward."""
    try:
        return not get_op(op).differentiable
    except KeyError:  # of another version
        return False


def _parts_of(op: str) -> tuple[str, ...]:
    """The ops that the default implementation calls; nothing for an op that this version does not have."""
    try:
        return get_implementation(op, DEFAULT).uses
    except (KeyError, Unavailable):
        return ()
