"""The choice: the default keeps its seat inside noise and margin, and what was asked for passes the gate or is told."""

from __future__ import annotations

import pytest

from llmmed.autotune.choose import choose, confirmed, force, not_called
from llmmed.autotune.plan import Candidate, Status, StepEvidence, StepTimes, StepTrial
from llmmed.errors import UserError


def timed(ms: float, spread: float = 0.001, status: Status = "verified") -> Candidate:
    return Candidate(status=status, total_ms=ms, total_ms_low=ms * (1 - spread), total_ms_high=ms * (1 + spread))


def test_the_fastest_verified_is_chosen() -> None:
    decision = choose("op", {"pytorch": timed(3), "liger": timed(2), "triton": timed(1)}, margin=0.02)
    assert decision.chosen == "triton"
    assert decision.reason == "fastest: 3.00x pytorch"
    assert decision.candidates["liger"].reason == "slower than triton (0.50x); 1.50x pytorch"
    assert decision.candidates["triton"].speedup == 3
    assert decision.warning is None


def test_a_gain_below_the_margin_does_not_count() -> None:
    candidates = {"pytorch": timed(1), "triton": timed(0.97)}
    assert choose("op", candidates, margin=0.05).chosen == "pytorch"
    assert "kernels.margin=0.05" in choose("op", candidates, margin=0.05).candidates["triton"].reason
    assert choose("op", candidates, margin=0.02).chosen == "triton"


def test_a_gain_within_noise_does_not_count() -> None:
    decision = choose("op", {"pytorch": timed(1, spread=0.2), "triton": timed(0.8, spread=0.2)}, margin=0)
    assert decision.chosen == "pytorch"
    assert decision.candidates["triton"].reason == "within noise of pytorch (1.25x)"
    slower = choose("op", {"pytorch": timed(1, spread=0.2), "triton": timed(1.2, spread=0.2)}, margin=0)
    assert slower.candidates["triton"].reason == "slower, within noise of pytorch (0.83x)"


@pytest.mark.parametrize("status", ["wrong", "crashed", "timed_out", "out_of_memory", "no_backward"])
def test_nothing_unverified_is_chosen_however_fast(status: Status) -> None:
    decision = choose("op", {"pytorch": timed(1), "triton": timed(0.001, status=status)}, margin=0)
    assert decision.chosen == "pytorch"


def test_a_wrong_default_gives_way_with_a_warning() -> None:
    candidates = {"pytorch": Candidate(status="wrong", reason="2 % off"), "liger": timed(2), "triton": timed(3)}
    decision = choose("op", candidates, margin=0.02)
    assert decision.chosen == "liger"
    assert decision.warning == "op 'op': the default is wrong: 2 % off; using liger, the fastest that is verified"


def test_with_nothing_verified_the_default_is_used_with_a_warning() -> None:
    decision = choose("op", {"pytorch": Candidate(status="crashed", reason="boom")}, margin=0.02)
    assert decision.chosen == "pytorch"
    assert "no candidate passed" in (decision.warning or "")


def test_with_nothing_tried_the_default_is_used_without_a_warning() -> None:
    candidates = {name: Candidate(status="not_tried", reason="not tried: no time") for name in ("pytorch", "triton")}
    decision = choose("op", candidates, margin=0.02)
    assert (decision.chosen, decision.warning) == ("pytorch", None)
    assert decision.reason == "the default; not tried: no time"


def trial(name: str, status: str) -> StepTrial:
    return StepTrial(op="op", name=name, against="pytorch", status=status, reason=f"{status} there")  # type: ignore[arg-type]


def test_without_the_steps_answer_the_default_stays() -> None:
    alone = choose("op", {"pytorch": timed(1.05), "triton": timed(1)}, margin=0.02)
    assert alone.chosen == "triton"
    decision = confirmed("op", alone, None, [], unanswered="no time")
    assert (decision.chosen, decision.reason) == ("pytorch", "the default: the step was not asked: no time")
    assert decision.candidates["triton"].reason == "faster alone (1.05x); the step was not asked: no time"
    accepted = confirmed("op", alone, None, [trial("triton", "accepted")], unanswered="no time")
    assert accepted.chosen == "pytorch"  # nothing has held the whole plan against it
    assert accepted.reason == "the default: the step gave no answer: no time"


@pytest.mark.parametrize("status", ["rejected", "failed"])
def test_what_the_step_has_refused_takes_nobodys_place(status: str) -> None:
    rivals = {"liger": timed(2), "triton": timed(1)}
    alone = choose("op", {"pytorch": timed(3)} | rivals, margin=0.02)
    first = confirmed("op", alone, None, [], default_runs=False)
    assert first.chosen == "triton"
    assert first.reason == "fastest: 3.00x pytorch; not confirmed: PyTorch's plan does not run"
    decision = confirmed("op", alone, None, [trial("triton", status)], default_runs=False)
    assert decision.chosen == "liger"
    assert decision.candidates["triton"].reason == f"{status} there"
    unproved = choose("op", {"pytorch": Candidate(status="wrong")} | rivals, margin=0.02)
    assert confirmed("op", unproved, None, []).chosen == "triton"
    both = [trial("triton", status), trial("liger", status)]
    assert confirmed("op", unproved, None, both).chosen == "pytorch"


def test_what_is_not_called_is_said_of_the_default_too() -> None:
    alone = choose("op", {"pytorch": timed(2), "triton": timed(1)}, margin=0.02)
    default, fused = (
        StepTimes(choice={"op": "pytorch", "fused": name}, ms=1, ms_low=1, ms_high=1, peak_memory_gib=None)
        for name in ("pytorch", "triton")
    )
    step = StepEvidence(
        trial_depth=2, depths=(1, 2), trials=[], default=default, chosen=fused, reason="", mode="eager", modes={},
        memory_budget_gib=None, micro_batches=1, finished=True,
    )  # fmt: skip
    spared = trial("triton", "rejected").model_copy(update={"reason": not_called("op")})
    assert confirmed("op", alone, step, [spared]).reason == "the default: the chosen plan does not call op"
    assert confirmed("op", alone, step, [trial("triton", "rejected")]).reason.endswith("makes the step better")
    given_up = step.model_copy(update={"chosen": default})  # whose plan calls it
    assert confirmed("op", alone, given_up, [spared]).reason.endswith("makes the step better")


def test_forced_and_verified_is_used_although_slower() -> None:
    decision = force("op", {"pytorch": timed(1), "triton": timed(2)}, "triton", "kernels=triton", fallback=False)
    assert (decision.chosen, decision.reason) == ("triton", "asked for by kernels=triton")
    assert decision.candidates["triton"].speedup == 0.5


@pytest.mark.parametrize("fallback", [True, False])
def test_forced_and_wrong_is_an_error_always(fallback: bool) -> None:
    candidates = {"triton": Candidate(status="wrong", reason="2 % off")}
    with pytest.raises(UserError, match=r"kernels=triton: implementation 'triton' of op 'op'.*wrong: 2 % off"):
        force("op", candidates, "triton", "kernels=triton", fallback=fallback)


def test_forced_and_unavailable_is_an_error_or_pytorch() -> None:
    candidates = {"triton": Candidate(status="unavailable", reason="needs a CUDA GPU")}
    with pytest.raises(UserError, match=r"needs a CUDA GPU.*kernels.on_unavailable=fallback"):
        force("op", candidates, "triton", "kernels=triton", fallback=False)
    decision = force("op", candidates, "triton", "kernels=triton", fallback=True)
    assert decision.chosen == "pytorch"
    assert "needs a CUDA GPU" in (decision.warning or "")
    assert set(decision.candidates) == {"triton", "pytorch"}


def test_pytorch_can_always_be_asked_for() -> None:
    decision = force("op", {"pytorch": Candidate(status="not_tried")}, "pytorch", "kernels=pytorch", fallback=False)
    assert (decision.chosen, decision.warning) == ("pytorch", None)


def test_what_was_given_up_with_the_whole_plan_is_said_of_both() -> None:
    alone = choose("op", {"pytorch": timed(2), "triton": timed(1)}, margin=0.02)
    plan = StepTimes(choice={"op": "pytorch"}, ms=1, ms_low=1, ms_high=1, peak_memory_gib=None)
    step = StepEvidence(
        trial_depth=2, depths=(1, 2), trials=[], default=plan, chosen=plan, reason="the plan with triton lost",
        mode="eager",
    )  # fmt: skip
    decision = confirmed("op", alone, step, [trial("triton", "accepted")])
    assert (decision.chosen, decision.reason) == ("pytorch", "the default: the plan with triton lost")
    assert decision.candidates["triton"].reason == (
        "accepted at first (accepted there), then given up with the whole plan"
    )
