"""The confirmation in the step, with an arena whose times are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from llmmed.autotune.confirm import Choice, Duel, Failed, Flip, Match, Terms, confirm, contest, shortlist
from llmmed.autotune.plan import Candidate, Mode, StepEvidence, StepTimes, StepTrial

BASE = {"rms_norm": "pytorch", "add_rms_norm": "pytorch", "rotary": "pytorch", "swiglu": "pytorch"}


@dataclass
class Known:
    """An arena that knows what each plan costs, in ms and MiB, and how noisy its clock is."""

    costs: dict[tuple[tuple[str, str], ...], float] = field(default_factory=dict)  # of partial choices, added up
    memory: dict[tuple[str, str], float] = field(default_factory=dict)
    noise: float = 0.01
    fails: tuple[tuple[str, str], ...] = ()
    modes: Mapping[str, float] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    shown: float = 1.0  # share of the memory that a duel sees
    mode_mib: float = 0.0  # that another mode takes
    as_a_whole: bool = True  # whether a plan that is not the default's runs as a whole
    whole_modes: list[Mode | None] = field(default_factory=list)
    losses_enough: list[bool] = field(default_factory=list)
    times: Mapping[str, float] = field(default_factory=dict)  # that a step makes the calls of an op
    trial_depth: int = 2
    depths: tuple[int, int] = (1, 2)
    resolution: float = 0.002

    def ms(self, choice: Choice) -> float:
        found = [value for parts, value in self.costs.items() if all(choice[op] == name for op, name in parts)]
        return 10.0 + sum(found)

    def mib(self, choice: Choice) -> float:
        return 1000.0 + sum(value for part, value in self.memory.items() if part in choice.items())

    def set_default(self, choice: Choice) -> None:
        if ("default", "fails") in self.fails:
            raise Failed("out of memory in the step: too much")

    def called(self, choice: Choice) -> set[str]:
        return {"add_rms_norm", "rotary", "swiglu"} | ({"rms_norm"} if choice["add_rms_norm"] == "pytorch" else set())

    def times_called(self, choice: Choice, op: str) -> float:
        return self.times.get(op, 1.0)

    def duel(self, champion: Choice, op: str, name: str) -> Duel:
        self.asked.append((op, name))
        if (op, name) in self.fails:
            raise Failed("crashed in the step: no such tile")
        challenger = {**champion, op: name}
        gain = self.ms(champion) - self.ms(challenger)
        return Duel(
            gain, gain - self.noise, gain + self.noise, self.shown * (self.mib(champion) - self.mib(challenger))
        )

    def whole(self, choice: Choice, other: Choice, mode: Mode | None = None, *, loss_is_enough: bool = False) -> Match:
        self.whole_modes.append(mode)
        self.losses_enough.append(loss_is_enough)
        if not self.as_a_whole and other != BASE:
            raise Failed("out of memory in the step")
        if mode is not None and mode not in self.modes:
            raise Failed("failed to compile in the step: no")
        a, b = (
            StepTimes(
                choice=dict(c),
                ms=factor * self.ms(c),
                ms_low=factor * self.ms(c) - self.noise,
                ms_high=factor * self.ms(c) + self.noise,
                peak_memory_gib=(self.mib(c) + more) / 1024,
            )
            for c, factor, more in (
                (choice, 1.0, 0.0),
                (other, self.modes[mode] if mode else 1.0, self.mode_mib if mode else 0.0),
            )
        )
        gain = a.ms - b.ms
        return Match(a, b, gain, gain - self.noise, gain + self.noise)


def decide(arena: Known, *flips: tuple[str, str], **change: Any) -> StepEvidence:
    found = {op: {"pytorch": timed(1.0)} for op in BASE}
    for op, name in flips:
        found[op][name] = timed(0.9)
    terms: dict[str, Any] = {
        "mode": "graphs", "other_modes": (), "objective": "time", "margin": 0.01, "memory_budget_gib": None,
        "before": (), "told": lambda trial: None, "time_is_up": lambda: False,
    }  # fmt: skip
    return confirm(arena, BASE, shortlist(BASE, found, everything=False), **{**terms, **change})


def timed(ms: float) -> Candidate:
    return Candidate(status="verified", total_ms=ms, total_ms_low=ms, total_ms_high=ms)


def test_only_what_the_step_gains_from_is_taken() -> None:
    arena = Known({(("rotary", "triton"),): -1.0, (("swiglu", "triton"),): +0.5})
    step = decide(arena, ("rotary", "triton"), ("swiglu", "triton"))
    assert step.chosen.choice == {**BASE, "rotary": "triton"}
    assert {(t.op, t.status) for t in step.trials} == {("rotary", "accepted"), ("swiglu", "rejected")}
    assert step.default.ms == 10.0
    assert step.chosen.ms == 9.0
    assert "11.1% faster" in step.reason
    rotary = next(trial for trial in step.trials if trial.op == "rotary")
    assert rotary.gain_ms == pytest.approx(1.0)
    assert "gains 10.0%" in rotary.reason


def test_noise_changes_nothing() -> None:
    arena = Known({(("rotary", "triton"),): -0.3}, noise=0.4)
    step = decide(arena, ("rotary", "triton"))
    assert step.chosen == step.default
    assert "within the step's noise" in step.trials[0].reason


@pytest.mark.parametrize(("gain", "saved", "taken"), [(0.1, 60.0, True), (0.1, 40.0, False), (-0.1, 60.0, False)])
def test_within_the_noise_much_less_memory_decides(gain: float, saved: float, taken: bool) -> None:
    """But nothing that looks slower, and the whole plan must win by its time all the same."""
    costs = {(("rotary", "triton"),): -gain, (("swiglu", "triton"),): -1.0}
    arena = Known(costs, {("rotary", "triton"): -saved}, noise=0.4)
    step = decide(arena, ("rotary", "triton"), ("swiglu", "triton"))
    trial = next(trial for trial in step.trials if trial.op == "rotary")
    assert trial.status == ("accepted" if taken else "rejected")
    assert (f"takes {saved:.0f} MiB less" in trial.reason) == taken
    assert step.chosen.choice["rotary"] == ("triton" if taken else "pytorch")
    assert decide(arena, ("rotary", "triton")).chosen.choice == BASE


def test_the_whole_plan_must_beat_the_margin() -> None:
    arena = Known({(("rotary", "triton"),): -0.05})
    step = decide(arena, ("rotary", "triton"))
    assert step.trials[0].status == "accepted"
    assert step.chosen.choice == BASE
    assert step.reason == (
        "the plan with triton for rotary gained no more than kernels.margin=0.01 as a whole: +0.5% (+0.4% to +0.6%)"
    )
    assert step.last_match is not None
    assert step.last_match.left.choice == {**BASE, "rotary": "triton"}
    assert (step.last_match.gain_ms, step.last_match.gain_ms_low) == pytest.approx((0.05, 0.04))


def test_a_gain_that_noise_may_be_keeps_the_default_and_is_told_with_its_interval() -> None:
    class Doubtful(Known):
        def whole(self, *plans: Any, **how: Any) -> Match:
            return replace(super().whole(*plans, **how), gain_ms_low=-0.5)

    step = decide(Doubtful({(("rotary", "triton"),): -1.0}), ("rotary", "triton"))
    assert step.chosen == step.default
    assert step.reason == "the plan with triton for rotary did not gain for sure as a whole: +11.1% (-5.6% to +11.2%)"
    assert step.last_match is not None
    assert step.last_match.left.ms == pytest.approx(9.0)


def test_an_interaction_is_found_when_the_plan_around_has_changed() -> None:
    # rotary alone costs a little; together with swiglu it gains.
    together = (("rotary", "triton"), ("swiglu", "triton"))
    arena = Known({(("rotary", "triton"),): 0.05, (("swiglu", "triton"),): -1.0, together: -0.5})
    found = {
        op: {"pytorch": timed(1.0), "triton": timed(0.5 if op == "rotary" else 0.9)} for op in ("rotary", "swiglu")
    }
    flips = shortlist(BASE, found, everything=False)
    assert [flip.op for flip in flips] == ["rotary", "swiglu"]
    left, trials, finished = contest(
        BASE, flips, arena, Terms("time", 10.0), before=(), told=lambda t: None, time_is_up=lambda: False
    )
    assert left == {**BASE, "rotary": "triton", "swiglu": "triton"}
    assert [(t.op, t.status) for t in trials] == [
        ("rotary", "rejected"),
        ("swiglu", "accepted"),
        ("rotary", "accepted"),
    ]
    assert finished


def test_without_time_for_second_looks_the_first_ones_stand() -> None:
    arena = Known({(("rotary", "triton"),): 0.05, (("swiglu", "triton"),): -1.0})
    found = {
        op: {"pytorch": timed(1.0), "triton": timed(0.5 if op == "rotary" else 0.9)} for op in ("rotary", "swiglu")
    }
    _, trials, finished = contest(
        BASE, shortlist(BASE, found, everything=False), arena, Terms("time", 10.0), before=(), told=lambda t: None,
        time_is_up=lambda: False, time_for_second_looks=lambda: False,
    )  # fmt: skip
    assert [t.op for t in trials] == ["rotary", "swiglu"]
    assert finished


def test_parts_are_tried_before_the_fused_op_and_then_have_no_work() -> None:
    arena = Known({(("add_rms_norm", "triton"),): -1.0})
    found = {op: {"pytorch": timed(1.0), "triton": timed(0.5)} for op in ("add_rms_norm", "rms_norm")}
    flips = shortlist(BASE, found, everything=False)
    assert [flip.op for flip in flips] == ["rms_norm", "add_rms_norm"]
    again = [*flips, flips[0]]
    _, trials, _ = contest(
        BASE, again[1:], arena, Terms("time", 10.0), before=(), told=lambda t: None, time_is_up=lambda: False
    )
    assert trials[-1].reason == "the chosen plan does not call rms_norm"


def test_a_fused_op_that_beats_the_best_of_its_parts_spares_their_trials() -> None:
    arena = Known({(("add_rms_norm", "triton"),): -1.0, (("rms_norm", "triton"),): -0.2})
    found = {
        "rms_norm": {"pytorch": timed(1.0), "triton": timed(0.8)},
        "add_rms_norm": {"pytorch": timed(1.5), "triton": timed(1.0)},
        "swiglu": {"pytorch": timed(2.0), "triton": timed(1.0)},
    }
    flips = shortlist(BASE, found, everything=False)
    assert [flip.op for flip in flips] == ["add_rms_norm", "swiglu", "rms_norm"]
    _, trials, _ = contest(
        BASE, flips, arena, Terms("time", 10.0), before=(), told=lambda t: None, time_is_up=lambda: False
    )
    assert ("rms_norm", "triton") not in arena.asked
    assert trials[-1].reason == "the chosen plan does not call rms_norm"
    refused = Known({(("add_rms_norm", "triton"),): +1.0, (("rms_norm", "triton"),): -0.2})
    left, _, _ = contest(
        BASE, flips, refused, Terms("time", 10.0), before=(), told=lambda t: None, time_is_up=lambda: False
    )
    assert left == {**BASE, "rms_norm": "triton"}


def test_parts_that_were_spared_are_tried_once_the_fused_op_is_given_up() -> None:
    fused, other, part = (("add_rms_norm", "triton"),), (("swiglu", "triton"),), (("rms_norm", "triton"),)
    arena = Known({fused: -0.05, other: -1.0, (*fused, *other): +0.3, part: -0.2})
    found = {
        "rms_norm": {"pytorch": timed(1.0), "triton": timed(0.8)},
        "add_rms_norm": {"pytorch": timed(1.5), "triton": timed(0.5)},
        "swiglu": {"pytorch": timed(2.0), "triton": timed(1.0)},
    }
    left, trials, finished = contest(
        BASE, shortlist(BASE, found, everything=False), arena, Terms("time", 10.0), before=(), told=lambda t: None,
        time_is_up=lambda: False,
    )  # fmt: skip
    assert [(t.op, t.status) for t in trials] == [
        ("add_rms_norm", "accepted"), ("swiglu", "accepted"), ("rms_norm", "rejected"), ("add_rms_norm", "accepted"),
        ("rms_norm", "accepted"),
    ]  # fmt: skip
    assert left == {**BASE, "swiglu": "triton", "rms_norm": "triton"}
    assert finished


def test_what_is_slower_alone_is_asked_only_where_memory_counts() -> None:
    found = {"rotary": {"pytorch": timed(1.0), "triton": timed(2.0)}}
    assert not shortlist(BASE, found, everything=False)
    assert [flip.name for flip in shortlist(BASE, found, everything=True)] == ["triton"]


def test_a_failure_in_the_step_is_a_reason_and_the_others_go_on() -> None:
    arena = Known({(("swiglu", "triton"),): -1.0}, fails=(("rotary", "triton"),))
    step = decide(arena, ("rotary", "triton"), ("swiglu", "triton"))
    assert {t.op: (t.status, t.reason) for t in step.trials}["rotary"] == (
        "failed",
        "crashed in the step: no such tile",
    )
    assert step.chosen.choice["swiglu"] == "triton"


def test_trials_of_a_process_that_died_are_not_repeated() -> None:
    arena = Known({(("rotary", "triton"),): -1.0})
    before = [
        StepTrial(op="rotary", name="triton", against="pytorch", status="accepted", reason="", gain_ms=1.0),
        StepTrial(op="swiglu", name="triton", against="", status="failed", reason="the process was killed by SIGSEGV"),
    ]
    step = decide(arena, ("rotary", "triton"), ("swiglu", "triton"), before=before)
    assert arena.asked == []
    assert step.chosen.choice == {**BASE, "rotary": "triton"}


def test_the_budget_leaves_the_best_so_far() -> None:
    arena = Known({(("rotary", "triton"),): -1.0, (("swiglu", "triton"),): -1.0})
    answers = iter([False, True, True])
    step = decide(arena, ("rotary", "triton"), ("swiglu", "triton"), time_is_up=lambda: next(answers))
    assert not step.finished
    assert sum(name == "triton" for name in step.chosen.choice.values()) == 1


def test_a_plan_that_does_not_fit_gives_way_to_a_slower_one() -> None:
    arena = Known({(("rotary", "triton"),): +2.0}, memory={("rotary", "triton"): -400.0, ("swiglu", "triton"): +300.0})
    arena.costs[(("swiglu", "triton"),)] = -1.0
    step = decide(arena, ("rotary", "triton"), ("swiglu", "triton"), memory_budget_gib=0.8)
    assert step.chosen.choice == {**BASE, "rotary": "triton"}
    assert "does not fit 0.80 GiB" in step.reason
    swiglu = next(trial for trial in step.trials if trial.op == "swiglu" and trial.reason.startswith("needs"))
    assert "kernels.memory_budget_gib" in swiglu.reason


def test_memory_can_be_the_objective() -> None:
    arena = Known({(("rotary", "triton"),): +2.0}, memory={("rotary", "triton"): -100.0})
    assert decide(arena, ("rotary", "triton")).chosen.choice == BASE
    step = decide(arena, ("rotary", "triton"), objective="memory")
    assert step.chosen.choice["rotary"] == "triton"
    assert step.chosen.peak_memory_gib == pytest.approx(900 / 1024)


def test_of_plans_with_equal_memory_the_faster_is_taken() -> None:
    arena = Known({(("rotary", "triton"),): -3.0}, memory={("rotary", "triton"): +5.0})
    step = decide(arena, ("rotary", "triton"), objective="memory")
    assert step.chosen.choice["rotary"] == "triton"
    arena.costs[(("rotary", "triton"),)] = +3.0
    assert decide(arena, ("rotary", "triton"), objective="memory").chosen.choice == BASE


def test_what_needs_more_than_the_budget_as_a_whole_is_not_taken() -> None:
    arena = Known({(("rotary", "triton"),): -1.0}, memory={("rotary", "triton"): 5000.0}, shown=0.1)
    step = decide(arena, ("rotary", "triton"), memory_budget_gib=2.0)
    assert step.trials[0].status == "accepted"  # the duel has seen too little of it
    assert step.chosen.choice == BASE
    assert "needs more than 2.00 GiB" in step.reason


def test_a_mode_that_takes_more_memory_is_not_taken() -> None:
    arena = Known(modes={"eager": 0.5}, mode_mib=3000.0)
    terms: dict[str, Any] = {"other_modes": ("eager",)}
    assert decide(arena, ("rotary", "triton"), **terms).mode == "eager"
    small = decide(arena, ("rotary", "triton"), memory_budget_gib=2.0, **terms)
    assert (small.mode, small.modes["eager"]) == ("graphs", 5.0)
    assert decide(arena, ("rotary", "triton"), objective="memory", **terms).mode == "graphs"


def first_looks(*trials: tuple[str, str, str, float]) -> list[StepTrial]:
    return [
        StepTrial(op=op, name=name, against="pytorch", status=status, reason="", gain_ms=gain)  # type: ignore[arg-type]
        for op, name, status, gain in trials
    ]


def second_looks(arena: Known, before: list[StepTrial]) -> list[tuple[str, str]]:
    contest(BASE, [], arena, Terms("time", 10.0), before=before, told=lambda t: None, time_is_up=lambda: False)
    return arena.asked


def test_a_second_look_is_taken_once() -> None:
    before = first_looks(("rotary", "triton", "rejected", -0.05), ("swiglu", "triton", "accepted", 1.0))
    assert second_looks(Known(), before) == [("rotary", "triton")]
    died = StepTrial(op="rotary", name="triton", against="", status="failed", reason="killed by SIGSEGV")
    assert second_looks(Known(), [*before, died]) == []
    again = first_looks(("rotary", "triton", "rejected", -0.04))
    assert second_looks(Known(), [*before, *again]) == []


def test_a_close_decision_for_a_flip_is_looked_at_again_once_too() -> None:
    before = first_looks(("rotary", "triton", "accepted", 0.05), ("swiglu", "triton", "accepted", 1.0))
    assert second_looks(Known(), before) == [("rotary", "pytorch")]
    died = StepTrial(op="rotary", name="pytorch", against="", status="failed", reason="killed by SIGSEGV")
    assert second_looks(Known(), [*before, died]) == []
    assert second_looks(Known(), [*before, *first_looks(("rotary", "pytorch", "rejected", 0.0))]) == []


def test_all_that_were_close_are_looked_at_again() -> None:
    before = first_looks(
        ("rotary", "triton", "rejected", -0.05),
        ("rotary", "liger", "rejected", -0.03),
        ("rotary", "slow", "rejected", -3.0),
        ("swiglu", "triton", "accepted", 1.0),
    )
    assert second_looks(Known(), before) == [("rotary", "liger"), ("rotary", "triton")]


def test_the_mode_is_chosen_with_the_plan() -> None:
    arena = Known({(("rotary", "triton"),): -1.0}, modes={"compiled": 0.9, "eager": 2.0})
    step = decide(arena, ("rotary", "triton"), other_modes=("compiled", "eager"))
    assert step.mode == "compiled"
    assert step.modes == pytest.approx({"graphs": 9.0, "compiled": 8.1, "eager": 18.0})
    arena.modes = {"compiled": 0.995}
    assert decide(arena, ("rotary", "triton"), other_modes=("compiled", "eager")).mode == "graphs"


@pytest.mark.parametrize(("noise", "taken"), [(4.0, "compiled"), (6.0, "graphs")])
def test_a_mode_whose_gain_noise_may_be_is_not_taken(noise: float, taken: str) -> None:
    """It gains 5 ms of 10, far more than the margin."""
    step = decide(Known(modes={"compiled": 0.5}, noise=noise), other_modes=("compiled",))
    assert step.mode == taken
    assert step.modes == {"graphs": 10.0, "compiled": 5.0}


@pytest.mark.parametrize("order", [("compiled", "eager"), ("eager", "compiled")])
def test_of_two_modes_that_gain_the_better_is_taken_in_whatever_order_they_come(order: tuple[Mode, Mode]) -> None:
    step = decide(Known(modes={"compiled": 0.5, "eager": 0.8}), other_modes=order)
    assert step.mode == "compiled"
    assert step.modes == {"graphs": 10.0, "compiled": 5.0, "eager": 8.0}


def test_a_plan_that_does_not_run_as_a_whole_gives_way_to_the_default() -> None:
    arena = Known({(("rotary", "triton"),): -1.0}, as_a_whole=False)
    step = decide(arena, ("rotary", "triton"))
    assert step.chosen == step.default
    assert step.chosen.choice == BASE
    assert step.reason == "the plan that was left does not run as a whole: out of memory in the step"


def test_the_match_that_a_process_died_in_is_not_held_again() -> None:
    arena = Known({(("rotary", "triton"),): -1.0})
    step = decide(arena, ("rotary", "triton"), last_match_died="the process was killed by SIGSEGV")
    assert len(arena.whole_modes) == 1  # the default against itself
    assert step.chosen.choice == BASE
    assert step.reason == "the plan that was left does not run as a whole: the process was killed by SIGSEGV"


def test_the_answer_is_told_before_what_comes_after_it() -> None:
    arena = Known({(("rotary", "triton"),): -1.0}, modes={"compiled": 0.9, "eager": 0.5})
    told: list[StepEvidence] = []
    answers = iter([False, False, True])  # before the trial, before the first mode, before the second
    step = decide(
        arena, ("rotary", "triton"), other_modes=("compiled", "eager"), answered=told.append,
        time_is_up=lambda: next(answers),
    )  # fmt: skip
    assert arena.whole_modes == [None, None, "compiled"]
    assert [(e.mode, set(e.modes), e.finished) for e in told] == [
        ("graphs", {"graphs"}, True),
        ("compiled", {"graphs", "compiled"}, True),
        ("compiled", {"graphs", "compiled"}, False),
    ]
    assert told[-1] == step
    assert {e.chosen.choice["rotary"] for e in told} == {"triton"}


def test_what_the_trials_say_is_told_before_the_last_match() -> None:
    costs = {(("rotary", "triton"),): -1.0, (("swiglu", "triton"),): -0.5}
    arena = Known(costs, {("rotary", "triton"): -512.0}, noise=0.3)
    told: list[StepEvidence] = []
    matches = len(arena.whole_modes)

    def hear(evidence: StepEvidence) -> None:
        assert len(arena.whole_modes) == matches + 1  # the default's own
        told.append(evidence)

    step = decide(arena, ("rotary", "triton"), ("swiglu", "triton"), expected=hear)
    (by_trials,) = told
    assert by_trials.chosen.choice == step.chosen.choice != BASE
    assert by_trials.chosen.ms == pytest.approx(8.5)
    assert by_trials.chosen.ms_high - by_trials.chosen.ms == pytest.approx(math.hypot(0.3, 0.3))
    assert by_trials.chosen.peak_memory_gib == pytest.approx(step.chosen.peak_memory_gib)
    assert not by_trials.finished
    assert "17.6% faster than PyTorch's, by trials of one kernel at a time" in by_trials.reason


def test_trials_that_do_not_add_up_to_the_margin_say_nothing() -> None:
    told: list[StepEvidence] = []
    step = decide(Known({(("rotary", "triton"),): -0.05}), ("rotary", "triton"), expected=told.append)
    assert step.trials[0].status == "accepted"
    assert not told


def test_that_nothing_was_tried_is_said() -> None:
    step = decide(Known(), ("rotary", "triton"), time_is_up=lambda: True)
    assert step.reason == "no other implementation was tried: kernels.budget_seconds was used up"


def test_a_default_that_cannot_run_is_said() -> None:
    with pytest.raises(Failed, match="out of memory"):
        decide(Known(fails=(("default", "fails"),)), ("rotary", "triton"))


@pytest.mark.parametrize(
    ("standing_ms", "times", "tried"),
    [(0.019, 1.0, False), (0.021, 1.0, True), (0.019, 4.0, True), (2.0, 0.009, False), (math.inf, 0.009, True)],
)
def test_what_takes_next_to_nothing_of_the_step_is_not_tried(standing_ms: float, times: float, tried: bool) -> None:
    """The step takes 10 ms."""
    arena = Known({(("rotary", "triton"),): -0.5}, times={"rotary": times})
    _, trials, finished = contest(
        BASE, [Flip("rotary", "triton", 0.01, standing_ms)], arena, Terms("time", 10.0), before=(),
        told=lambda trial: None, time_is_up=lambda: False,
    )  # fmt: skip
    assert finished
    assert bool(arena.asked) == tried
    assert len(trials) == 1  # and told once
    if not tried:
        assert (trials[0].status, trials[0].gain_ms) == ("rejected", None)
        assert "all of it takes 0.01" in trials[0].reason
        assert "ms of a step, too little to show" in trials[0].reason


@pytest.mark.parametrize(("terms", "tried"), [
    (Terms("memory", 10.0, 1000.0), True), (Terms("time", 10.0, 1000.0, 900.0), True),
    (Terms("time", 10.0, 1000.0, 1100.0), False),
])  # fmt: skip
def test_where_memory_is_scarce_it_is_tried_all_the_same(terms: Terms, tried: bool) -> None:
    arena = Known()
    contest(
        BASE, [Flip("rotary", "triton", 0.0, 0.001)], arena, terms, before=(), told=lambda trial: None,
        time_is_up=lambda: False,
    )  # fmt: skip
    assert bool(arena.asked) == tried


def test_what_took_next_to_nothing_is_tried_where_the_plan_calls_it_again() -> None:
    """The fused op is taken for its gain with another, and given back; its part, which it had spared, is then tried."""

    class Arena(Known):
        def times_called(self, choice: Choice, op: str) -> float:
            return 0.01 if choice["add_rms_norm"] == "triton" else 1.0

        def called(self, choice: Choice) -> set[str]:
            return {"add_rms_norm", "rotary", "swiglu", "rms_norm"}

    fused, other, part = (("add_rms_norm", "triton"),), (("swiglu", "triton"),), (("rms_norm", "triton"),)
    arena = Arena({fused: -0.05, other: -1.0, fused + other: 0.15, part: -0.3})
    flips = [Flip("add_rms_norm", "triton", 0.2, 2.0), Flip("rms_norm", "triton", 0.1, 1.0),
             Flip("swiglu", "triton", 0.1, 2.0)]  # fmt: skip
    left, trials, _ = contest(
        BASE, flips, arena, Terms("time", 10.0), before=(), told=lambda trial: None, time_is_up=lambda: False
    )
    reasons = [trial.reason for trial in trials if trial.op == "rms_norm"]
    assert "too little to show" in reasons[0]
    assert left == {**BASE, "swiglu": "triton", "rms_norm": "triton"}
