"""The regret of a choice: how much faster than the chosen plan any plan is that lies one or two flips from PyTorch's.

The tuner flips greedily and with few trials. This tries what it left out, the chosen plan against each neighbour in
the same minutes, and so says what greed costs. It takes minutes and chooses nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmmed.autotune.confirm import Arena, Choice, Failed
from llmmed.autotune.plan import KernelPlan
from llmmed.kernels.catalog import DEFAULT


@dataclass(frozen=True)
class Neighbour:
    """A plan near PyTorch's, and what its step saves against the chosen one, in ms with the 95 % interval.

    `reason` says why there are no times.
    """

    flips: dict[str, str]
    gain_ms: float | None = None
    gain_ms_low: float | None = None
    gain_ms_high: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        return ", ".join(f"{op} {name}" for op, name in self.flips.items()) or "PyTorch's plan"


@dataclass(frozen=True)
class Regret:
    """Every neighbour that was measured against the chosen plan, whose whole step takes `chosen_ms`."""

    chosen: dict[str, str]
    chosen_ms: float
    neighbours: list[Neighbour]
    left_out: int  # for lack of time

    @property
    def share(self) -> float:
        """Of the chosen plan's step: what the best neighbour saves beyond doubt, by the low end of its interval."""
        return max((n.gain_ms_low or 0.0 for n in self.neighbours), default=0.0) / self.chosen_ms

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": max(0.0, self.share)}


def neighbours(plan: KernelPlan, *, pairs: bool) -> list[dict[str, str]]:
    """The flips away from PyTorch's plan, of verified implementations: none, one, and if asked two."""
    single = [
        {op: name}
        for op, found in plan.ops.items()
        for name, candidate in found.candidates.items()
        if name != DEFAULT and candidate.status == "verified"
    ]
    double = [a | b for a, b in itertools.combinations(single, 2) if not a.keys() & b.keys()] if pairs else []
    return [{}, *single, *double]


def measure_regret(
    arena: Arena,
    plan: KernelPlan,
    flips: list[dict[str, str]],
    *,
    told: Callable[[Neighbour], None],
    time_is_up: Callable[[], bool],
) -> Regret:
    """Holds the chosen plan against its neighbours, one by one.

    Args:
        arena: Measures.
        plan: What the tuner chose.
        flips: From `neighbours`.
        told: Hears of each at once.
        time_is_up: Asked before each.

    Raises:
        Failed: not even the default or the chosen plan runs.
    """
    base: Choice = dict.fromkeys(plan.ops, DEFAULT)
    chosen: Mapping[str, str] = plan.choice
    arena.set_default(base)
    chosen_ms = arena.whole(chosen, chosen).first.ms
    found: list[Neighbour] = []
    for each in flips:
        if time_is_up():
            break
        try:
            match = arena.whole(chosen, {**base, **each}, sign_is_enough=True)
            neighbour = Neighbour(each, match.gain_ms, match.gain_ms_low, match.gain_ms_high)
        except Failed as failure:
            neighbour = Neighbour(each, reason=str(failure))
        found.append(neighbour)
        told(neighbour)
    return Regret(dict(chosen), chosen_ms, found, len(flips) - len(found))
