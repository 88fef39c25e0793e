"""The confirmation: which flips of one implementation the real step wants, one after the other, from the default plan.

What is fast alone can be slow in the step, where it keeps the compiler from fusing its neighbours, or where the host
and not the device is waited for. Nothing here knows a clock: `Arena` is what measures, `step_clock.py` the real one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llmmed.autotune.choose import not_called
from llmmed.autotune.plan import Candidate, LastMatch, Mode, StepEvidence, StepTimes, StepTrial
from llmmed.kernels.catalog import DEFAULT, default_choice, get_implementation, with_uses

Choice = Mapping[str, str]
Objective = Literal["time", "memory"]

_TOO_LITTLE = "too little to show"
_HOPELESS = 1.15  # alone, times what it would replace: beyond, the step is not asked
_REVISITED = 0.01  # of the step: a flip that matters less is looked at again once the plan around it has changed
_NOT_AS_A_WHOLE = "the plan that was left does not run as a whole"
_EQUAL_MEMORY = 0.01  # of the step's: below, two plans take the same
_MUCH_MEMORY = 0.05  # of the step's: what saves more is taken also where the time shows neither gain nor loss


@dataclass(frozen=True)
class Flip:
    """An implementation to try for an op, and what it saves alone, in ms of a micro-batch (negative: it costs).

    `standing_ms` is what that takes alone which it would replace, all calls of the default plan's micro-batch.
    """

    op: str
    name: str
    alone_ms: float
    standing_ms: float = math.inf


@dataclass(frozen=True)
class Duel:
    """What a challenger saves the whole model's step against the champion: ms with its 95 % interval, and memory."""

    gain_ms: float
    gain_ms_low: float
    gain_ms_high: float
    memory_gain_mib: float | None


@dataclass(frozen=True)
class Match:
    """Two plans in the whole model's step, and what the second saves, in ms with its 95 % interval.

    What they share, such as a drift of the clock rate, is in both times and not in what one saves.
    """

    first: StepTimes
    second: StepTimes
    gain_ms: float
    gain_ms_low: float
    gain_ms_high: float


class Failed(Exception):
    """The challenger cannot be part of the step, or computes something else in it. The message is the reason."""


class Arena(Protocol):
    """Where plans meet.

    `trial_depth` is the number of layers that a duel has, `depths` those that the whole model's time is drawn from.
    `resolution` is the share of a step that a duel can tell from nothing.
    """

    trial_depth: int
    depths: tuple[int, int]
    resolution: float

    def set_default(self, choice: Choice) -> None:
        """Takes the plan that all others must agree with. Raises `Failed` if it cannot run in this mode."""
        ...

    def times_called(self, choice: Choice, op: str) -> float:
        """How often a step under a plan, which calls the op, makes the calls of it that PyTorch's micro-batch makes:
        the number of micro-batches, and less where a fused op has taken some of the calls."""
        ...

    def called(self, choice: Choice) -> set[str]:
        """The ops that a step under this plan calls: a fused op leaves its parts without work."""
        ...

    def duel(self, champion: Choice, op: str, name: str) -> Duel:
        """Times the champion against itself with one op flipped. Raises `Failed`."""
        ...

    def whole(self, choice: Choice, other: Choice, mode: Mode | None = None, *, loss_is_enough: bool = False) -> Match:
        """Two plans, the whole model; the second in another mode than the first if one is given. Raises `Failed`.

        Where a loss is enough, it ends once the second is slower for sure; between modes, once either is.
        """
        ...


@dataclass(frozen=True)
class Terms:
    """What counts.

    Args:
        objective: What to take least of.
        step_ms: The default plan's whole step, by which small is judged.
        peak_mib: Its peak memory, None on a CPU.
        budget_mib: The memory that a plan may take, None for any.
    """

    objective: Objective
    step_ms: float
    peak_mib: float | None = None
    budget_mib: float | None = None


def shortlist(base: Choice, candidates: Mapping[str, Mapping[str, Candidate]], *, everything: bool) -> list[Flip]:
    """The flips worth a look in the step, by what they save; parts before the fused op that would replace them, unless
    that alone is faster than the default would be with the best of its parts: taken, it spares the step their trials.

    Args:
        base: The plan to start from.
        candidates: Of the ops that are up for choice.
        everything: Whether to try even what is slower alone, because memory counts.
    """
    flips: list[Flip] = []
    for op, found in candidates.items():
        standing = found[base[op]].total_ms
        for name, candidate in found.items():
            if name == base[op] or candidate.status != "verified" or candidate.total_ms is None:
                continue
            if everything or standing is None or candidate.total_ms <= _HOPELESS * standing:
                saved = (standing or candidate.total_ms) - candidate.total_ms
                flips.append(Flip(op, name, saved, standing or math.inf))

    def saved_by_parts(op: str) -> float:
        parts = with_uses(get_implementation(op, DEFAULT).uses, {**default_choice(), **base})
        return sum(max((flip.alone_ms for flip in flips if flip.op == part), default=0.0) for part in parts)

    def place(flip: Flip) -> int:
        depth = _depth_of_fusion(flip.op)
        return -1 if depth and flip.alone_ms > max(0.0, saved_by_parts(flip.op)) else depth

    return sorted(flips, key=lambda flip: (place(flip), -flip.alone_ms))


def confirm(
    arena: Arena,
    base: Choice,
    flips: Sequence[Flip],
    *,
    mode: Mode,
    other_modes: Sequence[Mode],
    objective: Objective,
    margin: float,
    memory_budget_gib: float | None,
    before: Sequence[StepTrial],
    told: Callable[[StepTrial], None],
    time_is_up: Callable[[], bool],
    time_for_second_looks: Callable[[], bool] = lambda: True,
    expected: Callable[[StepEvidence], None] = lambda evidence: None,
    answered: Callable[[StepEvidence], None] = lambda evidence: None,
    last_match_died: str = "",
    micro_batches: int = 1,
) -> StepEvidence:
    """Starts from a plan, tries flips, and holds what is left against that plan once more.

    Args:
        arena: Measures.
        base: The default plan.
        flips: In the order to try them.
        mode: How the step runs.
        other_modes: How else it might run, where that is open.
        objective: What to take least of.
        margin: The share by which another plan must beat the default, e.g. 0.01.
        memory_budget_gib: What a plan may take, None for any.
        before: Trials of a process that died.
        told: Hears of every trial at once.
        time_is_up: Asked before each trial, and before each mode.
        time_for_second_looks: Asked before each flip that is tried once more; without it, the contest is complete.
        expected: Hears what the trials alone make of the plan that was left, before the last match: who has no time for
            that takes it.
        answered: Hears of the answer once there is one, and again with each mode: what comes after may not end well.
        last_match_died: What became of a process before this one in the last match, which then is not held again.
        micro_batches: Of a step.

    Raises:
        Failed: not even the default plan runs.
    """
    arena.set_default(base)
    start = arena.whole(base, base).first
    terms = Terms(objective, start.ms, _mib(start.peak_memory_gib), _mib(memory_budget_gib))
    left, trials, finished = contest(
        base, flips, arena, terms,
        before=before, told=told, time_is_up=time_is_up, time_for_second_looks=time_for_second_looks,
    )  # fmt: skip

    def evidence_of(
        default: StepTimes, chosen: StepTimes, reason: str, *, finished: bool, last_match: LastMatch | None = None
    ) -> StepEvidence:
        return StepEvidence(
            trial_depth=arena.trial_depth,
            depths=arena.depths,
            trials=trials,
            default=default,
            chosen=chosen,
            last_match=last_match,
            reason=reason,
            mode=mode,
            modes={mode: chosen.ms},
            memory_budget_gib=memory_budget_gib,
            micro_batches=micro_batches,
            finished=finished,
        )

    default, chosen, reason, last_match = start, start, "no other implementation makes the step better", None
    if not trials:
        reason = "no other implementation was tried: kernels.budget_seconds was used up"
    elif last_match_died and left != dict(base):
        reason = f"{_NOT_AS_A_WHOLE}: {last_match_died}"
    elif left != dict(base):
        by_trials, why = _by_trials(left, start, trials, terms, margin)
        if by_trials.choice != start.choice:
            expected(evidence_of(start, by_trials, why, finished=False))
        default, chosen, reason, last_match = _last_match(arena, base, left, start, terms, margin)
    evidence = evidence_of(default, chosen, reason, finished=finished, last_match=last_match)
    answered(evidence)
    least = margin * chosen.ms
    for other in other_modes:
        if time_is_up():
            evidence = evidence.model_copy(update={"finished": False})
            answered(evidence)
            break
        try:
            match = arena.whole(chosen.choice, chosen.choice, other)
        except Failed:
            continue
        found: dict[str, object] = {"modes": evidence.modes | {other: match.second.ms}}
        if match.gain_ms > least and match.gain_ms_low > 0 and _takes_no_more(match, terms):
            least, found["mode"] = match.gain_ms, other
        evidence = evidence.model_copy(update=found)
        answered(evidence)
    return evidence


def _by_trials(
    left: Choice, start: StepTimes, trials: Sequence[StepTrial], terms: Terms, margin: float
) -> tuple[StepTimes, str]:
    """The plan that stays by what the trials alone say of the one that was left, and why: their gains add up, and their
    errors, measured independently, in squares."""
    won = [trial for trial in trials if trial.status == "accepted"]
    gains = [(t.gain_ms, t.gain_ms_low, t.gain_ms_high) for t in won]
    gain = sum(middle or 0.0 for middle, _, _ in gains)
    spread = math.hypot(*(((high or 0.0) - (low or 0.0)) / 2 for _, low, high in gains))
    saved = sum(trial.memory_gain_mib or 0.0 for trial in won) / 1024
    times = StepTimes(
        choice=dict(left),
        ms=start.ms - gain,
        ms_low=start.ms - gain - spread,
        ms_high=start.ms - gain + spread,
        peak_memory_gib=None if start.peak_memory_gib is None else start.peak_memory_gib - saved,
    )
    keeps, reason = _keeps_its_seat(Match(start, times, gain, gain - spread, gain + spread), terms, margin)
    told = f"{reason}, by trials of one kernel at a time: kernels.budget_seconds left no time for the plan as a whole"
    return start if keeps else times, told


def _last_match(
    arena: Arena, base: Choice, left: Choice, start: StepTimes, terms: Terms, margin: float
) -> tuple[StepTimes, StepTimes, str, LastMatch | None]:
    """The plan that was left against the default: the default's times, those of the one that stays, why, and what the
    match said."""
    try:
        match = arena.whole(base, left)
    except Failed as failure:
        return start, start, f"{_NOT_AS_A_WHOLE}: {failure}", None
    keeps, reason = _keeps_its_seat(match, terms, margin)
    said = LastMatch(
        left=match.second, gain_ms=match.gain_ms, gain_ms_low=match.gain_ms_low, gain_ms_high=match.gain_ms_high
    )
    return match.first, match.first if keeps else match.second, reason, said


def contest(
    base: Choice,
    flips: Sequence[Flip],
    arena: Arena,
    terms: Terms,
    *,
    before: Sequence[StepTrial],
    told: Callable[[StepTrial], None],
    time_is_up: Callable[[], bool],
    time_for_second_looks: Callable[[], bool] = lambda: True,
) -> tuple[dict[str, str], list[StepTrial], bool]:
    """Flips one implementation after the other and keeps what the step gains from.

    Args:
        base: The plan to start from.
        flips: In the order to try them.
        arena: Measures.
        terms: What counts.
        before: Trials of a process that died; they are not repeated.
        told: Hears of every trial at once.
        time_is_up: Asked before each trial.
        time_for_second_looks: Asked before each flip that is tried once more; without it, the contest is complete.

    Returns:
        The plan that was left, all trials, and whether they came to their end.
    """
    standing = {(flip.op, flip.name): flip.standing_ms for flip in flips}
    state = _State(dict(base), arena, terms, list(before), told, standing)
    for trial in before:
        if trial.status == "accepted":
            state.take(trial)
    tried = {(trial.op, trial.name) for trial in before}
    for flip in flips:
        if (flip.op, flip.name) in tried:
            continue
        if time_is_up():
            return state.champion, state.trials, False
        state.attempt(flip.op, flip.name)
    for op, name in state.to_revisit(base):
        if not time_for_second_looks():
            break
        if state.champion[op] != name:
            state.attempt(op, name)
    for op, name in state.spared():
        if time_is_up():
            return state.champion, state.trials, False
        state.attempt(op, name)
    return state.champion, state.trials, True


class _State:
    def __init__(
        self,
        champion: dict[str, str],
        arena: Arena,
        terms: Terms,
        trials: list[StepTrial],
        told: Callable[[StepTrial], None],
        standing: Mapping[tuple[str, str], float],
    ) -> None:
        self.champion, self.trials = champion, trials
        self._arena, self._terms, self._told, self._standing = arena, terms, told, standing
        self._peak = terms.peak_mib

    def take(self, trial: StepTrial) -> None:
        self.champion[trial.op] = trial.name
        if self._peak is not None and trial.memory_gain_mib is not None:
            self._peak -= trial.memory_gain_mib

    def attempt(self, op: str, name: str) -> None:
        against = self.champion[op]
        if op not in self._arena.called(self.champion):
            trial = StepTrial(op=op, name=name, against=against, status="rejected", reason=not_called(op))
        elif reason := self._too_little(op, name):
            trial = StepTrial(op=op, name=name, against=against, status="rejected", reason=reason)
        else:
            trial = self._fight(op, name, against)
        self.trials.append(trial)
        if trial.status == "accepted":
            self.take(trial)
        self._told(trial)

    def _too_little(self, op: str, name: str) -> str:
        """Why a step could gain nothing that shows; empty if it could. Where memory is scarce, it is tried anyway."""
        standing_ms, budget = self._standing.get((op, name), math.inf), self._terms.budget_mib
        too_large = budget is not None and self._peak is not None and self._peak > budget
        if too_large or self._terms.objective == "memory" or not math.isfinite(standing_ms):
            return ""
        at_stake = standing_ms * self._arena.times_called(self.champion, op)
        if at_stake >= self._arena.resolution * self._terms.step_ms:
            return ""
        return f"all of it takes {at_stake:.2g} ms of a step, {_TOO_LITTLE}"

    def spared(self) -> list[tuple[str, str]]:
        """Flips that were not tried because the champion of then did not call their op, or hardly, and which that of
        now does."""
        called = self._arena.called(self.champion)
        last = {(trial.op, trial.name): trial.reason for trial in self.trials}
        return [
            (op, name)
            for (op, name), reason in last.items()
            if (reason == not_called(op) or reason.endswith(_TOO_LITTLE))
            and op in called
            and not self._too_little(op, name)
        ]

    def _fight(self, op: str, name: str, against: str) -> StepTrial:
        try:
            duel = self._arena.duel(dict(self.champion), op, name)
        except Failed as failure:
            return StepTrial(op=op, name=name, against=against, status="failed", reason=str(failure))
        verdict, reason = self._judge(duel)
        return StepTrial(
            op=op,
            name=name,
            against=against,
            status=verdict,
            reason=reason,
            gain_ms=duel.gain_ms,
            gain_ms_low=duel.gain_ms_low,
            gain_ms_high=duel.gain_ms_high,
            memory_gain_mib=duel.memory_gain_mib,
        )

    def _judge(self, duel: Duel) -> tuple[Literal["accepted", "rejected"], str]:
        saved, budget, peak = duel.memory_gain_mib, self._terms.budget_mib, self._peak
        share = duel.gain_ms / self._terms.step_ms
        time = f"the step {'gains' if share >= 0 else 'loses'} {abs(share):.1%}"
        if saved is not None and peak is not None:
            if budget is not None and peak > budget:
                took = "accepted" if saved > _EQUAL_MEMORY * peak else "rejected"
                return took, f"the plan does not fit; this takes {saved:+,.0f} MiB off ({time})"  # type: ignore[return-value]
            if budget is not None and peak - saved > budget:
                return "rejected", f"needs {-saved:,.0f} MiB more, which kernels.memory_budget_gib does not allow"
            if self._terms.objective == "memory" and abs(saved) > _EQUAL_MEMORY * peak:
                return "accepted" if saved > 0 else "rejected", f"the step takes {-saved:+,.0f} MiB; {time}"
        if duel.gain_ms_low > 0:
            return "accepted", time
        if duel.gain_ms_high < 0:
            return "rejected", f"{time} ({duel.gain_ms:+.3g} ms)"
        low, high = duel.gain_ms_low / self._terms.step_ms, duel.gain_ms_high / self._terms.step_ms
        noise = f"within the step's noise ({low:+.1%} to {high:+.1%})"
        if duel.gain_ms >= 0 and saved is not None and peak is not None and saved > _MUCH_MEMORY * peak:
            return "accepted", f"{noise}, and takes {saved:,.0f} MiB less"
        return "rejected", noise

    def to_revisit(self, base: Choice) -> list[tuple[str, str]]:
        """Close decisions that were made against another plan than the one that is left, the closest first."""
        last = {(trial.op, trial.name): index for index, trial in enumerate(self.trials)}
        last_change = max((i for i, t in enumerate(self.trials) if t.status == "accepted"), default=-1)
        found: dict[tuple[str, str], float] = {}
        for (op, name), index in last.items():
            trial = self.trials[index]
            close = trial.gain_ms is not None and abs(trial.gain_ms) < _REVISITED * self._terms.step_ms
            if index >= last_change or not close or trial.status == "failed":
                continue
            if trial.status == "accepted" and self.champion[op] != name:
                continue
            rival = (op, name if trial.status == "rejected" else base[op])
            looked_at = last.get(rival, -1)
            settled = looked_at > last_change or (looked_at >= 0 and self.trials[looked_at].status == "failed")
            if rival[1] != self.champion[op] and not settled:
                found.setdefault(rival, abs(trial.gain_ms or 0.0))
        return sorted(found, key=lambda flip: found[flip])


def _keeps_its_seat(match: Match, terms: Terms, margin: float) -> tuple[bool, str]:
    """Whether the default plan, the first, stays although flips were accepted, and why not or why."""
    default, chosen = match.first, match.second
    before, after = _mib(default.peak_memory_gib), _mib(chosen.peak_memory_gib)
    share, low, high = (
        gain / (default.ms - match.gain_ms) for gain in (match.gain_ms, match.gain_ms_low, match.gain_ms_high)
    )
    time = f"the step is {abs(share):.1%} {'faster' if share >= 0 else 'slower'} than PyTorch's"
    if before is not None and after is not None:
        memory = f"takes {after / 1024:.2f} GiB instead of {before / 1024:.2f}"
        if terms.budget_mib is not None and max(before, after) > terms.budget_mib:
            limit = f"{terms.budget_mib / 1024:.2f} GiB"
            if before <= terms.budget_mib:
                return True, f"the plan that was left needs more than {limit}: {memory}, and {time}"
            return after >= before, f"PyTorch's plan does not fit {limit}; this one {memory}, and {time}"
        if terms.objective == "memory" and abs(after - before) > _EQUAL_MEMORY * before:
            return after > before, f"{memory}; {time}"
    if share > margin and low > 0:
        return False, time
    others = [f"{name} for {op}" for op, name in chosen.choice.items() if name != default.choice[op]]
    less = f"gained no more than kernels.margin={margin:g}" if share <= margin else "did not gain for sure"
    return True, f"the plan with {', '.join(others)} {less} as a whole: {share:+.1%} ({low:+.1%} to {high:+.1%})"


def _takes_no_more(match: Match, terms: Terms) -> bool:
    """Whether the memory of the second, the first in another mode, is within the terms."""
    before, after = _mib(match.first.peak_memory_gib), _mib(match.second.peak_memory_gib)
    if before is None or after is None:
        return True
    if terms.budget_mib is not None and after > max(before, terms.budget_mib):
        return False
    return terms.objective == "time" or after <= before * (1 + _EQUAL_MEMORY)


def _mib(gib: float | None) -> float | None:
    return None if gib is None else gib * 1024


def _depth_of_fusion(op: str) -> int:
    """How many levels of other ops the default of an op calls."""
    return max((1 + _depth_of_fusion(part) for part in get_implementation(op, DEFAULT).uses), default=0)
