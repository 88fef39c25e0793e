"""The regret of a choice: how much faster than the chosen plan any plan is that lies near it, or near PyTorch's.

The tuner flips greedily and with few trials. This tries what it left out, the chosen plan against each neighbour in
the same minutes, and so says what greed costs. It takes minutes and chooses nothing. Neighbours are plans that differ
from the chosen one in one op, or in a fused op and one of its parts, and those one or two flips away from PyTorch's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmmed.autotune.confirm import Arena, Choice, Failed
from llmmed.autotune.plan import KernelPlan
from llmmed.errors import UserError
from llmmed.files import read_json
from llmmed.kernels.catalog import DEFAULT, get_implementation


@dataclass(frozen=True)
class Neighbour:
    """A plan, and what its step saves against the chosen one, in ms with the 95 % interval.

    `flips` are from PyTorch's plan, or from the chosen one. `reason` says why there are no times.
    """

    flips: dict[str, str]
    from_chosen: bool = False
    gain_ms: float | None = None
    gain_ms_low: float | None = None
    gain_ms_high: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        told = ", ".join(f"{op} {name}" for op, name in self.flips.items())
        return f"the chosen, but {told}" if self.from_chosen else told or "PyTorch's plan"


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


def neighbours(plan: KernelPlan, *, pairs: bool) -> list[Neighbour]:
    """Of verified implementations, not measured yet: the flips away from the chosen plan, a fused op for one of its
    parts among them, and those away from PyTorch's, none, one, and if asked two. None is the chosen plan, and none
    comes twice."""
    verified = [
        (op, name)
        for op, found in plan.ops.items()
        for name, candidate in found.candidates.items()
        if candidate.status == "verified"
    ]
    near = [Neighbour({op: name}, from_chosen=True) for op, name in verified if name != plan.choice[op]]
    near += [
        Neighbour({fused: DEFAULT, op: name}, from_chosen=True)
        for fused, chosen in plan.choice.items()
        if chosen != DEFAULT
        for op, name in verified
        if op in get_implementation(fused, DEFAULT).uses and name != DEFAULT
    ]
    single = [{op: name} for op, name in verified if name != DEFAULT]
    double = [a | b for a, b in itertools.combinations(single, 2) if not a.keys() & b.keys()] if pairs else []
    found: dict[tuple[tuple[str, str], ...], Neighbour] = {}
    for each in (*near, *map(Neighbour, ({}, *single, *double))):
        choice = choice_of(each, plan)
        if choice != plan.choice:
            found.setdefault(tuple(sorted(choice.items())), each)
    return list(found.values())


def choice_of(neighbour: Neighbour, plan: KernelPlan) -> dict[str, str]:
    """All of its plan."""
    return {**(plan.choice if neighbour.from_chosen else dict.fromkeys(plan.ops, DEFAULT)), **neighbour.flips}


def measure_regret(
    arena: Arena,
    plan: KernelPlan,
    unmeasured: list[Neighbour],
    *,
    told: Callable[[Regret], None],
    time_is_up: Callable[[], bool],
    ready: Callable[[Choice], None] = lambda choice: None,
    before: Sequence[Neighbour] = (),
) -> Regret:
    """Holds the chosen plan against its neighbours, one by one.

    Args:
        arena: Measures.
        plan: What the tuner chose.
        unmeasured: From `neighbours`. Those whose step does not call what they flip are passed over.
        told: Hears after each of what is known so far; the last neighbour is the new one.
        time_is_up: Asked before each.
        ready: Called with a plan before it is timed; may wait, say for a compiler.
        before: Neighbours that were measured before, each against the chosen plan in the minutes of its own.

    Raises:
        Failed: not even the default or the chosen plan runs.
    """
    chosen: Choice = plan.choice
    default = dict.fromkeys(plan.ops, DEFAULT)
    ready(default)
    arena.set_default(default)
    ready(chosen)
    chosen_ms = arena.whole(chosen, chosen).first.ms
    wanted = [each for each in unmeasured if each.flips.keys() <= arena.called(choice_of(each, plan))]
    known = {each.name for each in before}
    open_ones = [each for each in wanted if each.name not in known]
    found = list(before)

    def so_far() -> Regret:
        return Regret(dict(chosen), chosen_ms, list(found), len(open_ones) - (len(found) - len(before)))

    for each in open_ones:
        if time_is_up():
            break
        try:
            ready(choice_of(each, plan))
            match = arena.whole(chosen, choice_of(each, plan), loss_is_enough=True)
            neighbour = replace(
                each, gain_ms=match.gain_ms, gain_ms_low=match.gain_ms_low, gain_ms_high=match.gain_ms_high
            )
        except Failed as failure:
            neighbour = replace(each, reason=str(failure))
        found.append(neighbour)
        told(so_far())
    return so_far()


def measured_before(path: Path, about: Mapping[str, Any]) -> list[Neighbour]:
    """What an earlier run has written there beside the same `about`; nothing if there is no file.

    Raises:
        UserError: it is of something else.
    """
    if not path.exists():
        return []
    try:
        found = read_json(path)
        neighbours = [Neighbour(**each) for each in found["neighbours"]]
        others = [key for key, value in about.items() if found.get(key) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"out={path}: it is there, and not what scripts/regret.py writes; name another file") from error
    if others:
        raise UserError(f"out={path}: it is there, of other {', '.join(others)}; name another file, or remove it")
    return neighbours
