"""The step's time by op: no call counted twice, nothing invented where nothing was measured."""

from __future__ import annotations

import pytest

from llmmed.autotune.plan import CallCount, Candidate, KernelPlan, OpPlan, StepEvidence, StepTimes
from llmmed.reporting import plan_shares
from tests.reporting.test_kernel_table import make_plan


def op(name: str, count: int, chosen: str, times: dict[str, float | None]) -> OpPlan:
    candidates = {key: Candidate(status="verified", total_ms=ms) for key, ms in times.items()}
    calls = [CallCount(op=name, arguments={}, count=count)]
    return OpPlan(chosen=chosen, reason="", calls=calls, candidates=candidates, source_sha256="")


def plan_with(ops: dict[str, OpPlan], step_ms: float | None) -> KernelPlan:
    plan = make_plan().model_copy(update={"ops": ops})
    if step_ms is None:
        return plan
    default = dict.fromkeys(ops, "pytorch")
    chosen = StepTimes(choice=plan.choice, ms=step_ms, ms_low=step_ms, ms_high=step_ms, peak_memory_gib=None)
    slower = chosen.model_copy(update={"choice": default, "ms": step_ms + 6})
    step = StepEvidence(
        trial_depth=1, depths=(1, 2), trials=[], default=slower, chosen=chosen, reason="", mode="eager"
    )  # fmt: skip
    return plan.model_copy(update={"step": step})


OPS = {
    "add_rms_norm": op("add_rms_norm", 4, "triton", {"pytorch": 8.0, "triton": 4.0}),
    "rms_norm": op("rms_norm", 5, "triton", {"pytorch": 5.0, "triton": 2.5}),
    "rotary": op("rotary", 2, "pytorch", {"pytorch": 3.0}),
    "of_another_version": op("of_another_version", 1, "pytorch", {"pytorch": None}),
}


def test_calls_that_another_op_makes_count_there() -> None:
    found = plan_shares.of_chosen(plan_with(OPS, 10.0))
    times = {part.op: (part.implementation, part.ms) for part in found.parts}
    # Four of the five rms_norm calls are made inside add_rms_norm.
    assert times == {"add_rms_norm": ("triton", 4.0), "rotary": ("pytorch", 3.0), "rms_norm": ("triton", 0.5)}
    assert found.rest_ms == pytest.approx(2.5)
    assert found.untimed == ("of_another_version",)


def test_the_default_is_told_with_its_own_times() -> None:
    found = plan_shares.of_default(plan_with(OPS, 10.0))
    assert {part.op: part.ms for part in found.parts} == {"add_rms_norm": 8.0, "rotary": 3.0, "rms_norm": 1.0}
    assert found.step_ms == 16.0
    assert found.rest_ms == pytest.approx(4.0)


def test_a_step_of_several_micro_batches_counts_all_of_them_and_one_update() -> None:
    ops = {"rotary": OPS["rotary"], "newton_schulz": op("newton_schulz", 2, "pytorch", {"pytorch": 1.5})}
    plan = plan_with(ops, 20.0)
    assert plan.step is not None
    several = plan.model_copy(update={"step": plan.step.model_copy(update={"micro_batches": 4})})
    found = plan_shares.of_chosen(several)
    assert {part.op: part.ms for part in found.parts} == {"rotary": 12.0, "newton_schulz": 1.5}
    assert found.rest_ms == pytest.approx(6.5)
    assert found.whole == "step"


def test_without_a_measured_step_there_is_no_rest() -> None:
    found = plan_shares.of_chosen(plan_with(OPS, None))
    assert found.step_ms is None
    assert found.rest_ms is None
    assert found.whole == "micro-batch"


def test_a_step_shorter_than_its_ops_has_no_rest() -> None:
    assert plan_shares.of_chosen(plan_with(OPS, 5.0)).rest_ms is None
