"""What the cache keeps: what was cut off is gone on with, and no passing trouble is believed at once."""

from __future__ import annotations

from typing import Any

import pytest

from llmmed.autotune.child import Findings
from llmmed.autotune.evidence import Evidence, evidence_of, findings_of, lasting
from llmmed.autotune.journal import Task
from llmmed.autotune.plan import Candidate, Status, StepEvidence, StepTimes, StepTrial
from llmmed.autotune.workload import Workload

TIMED = Candidate(status="verified", total_ms=1.0, total_ms_low=1.0, total_ms_high=1.0)


def trial(name: str, status: str, reason: str = "") -> StepTrial:
    return StepTrial(op="rms_norm", name=name, against="pytorch", status=status, reason=reason)  # type: ignore[arg-type]


def answer(chosen: str, reason: str = "faster") -> StepEvidence:
    times = {"ms": 1.0, "ms_low": 1.0, "ms_high": 1.0, "peak_memory_gib": None}
    default = StepTimes(choice={"rms_norm": "pytorch"}, **times)  # type: ignore[arg-type]
    return StepEvidence(
        trial_depth=1, depths=(1, 1), trials=[], default=default, mode="eager", reason=reason,
        chosen=default if chosen == "pytorch" else default.model_copy(update={"choice": {"rms_norm": chosen}}),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("timed_out", "took longer than kernels.candidate_seconds=90 while it was verified"),
        ("out_of_memory", "out of memory"),
        ("crashed", "the process was killed by SIGKILL (out of memory?) while it was verified"),
    ],
)
def test_what_may_pass_is_believed_the_second_time(status: Status, reason: str) -> None:
    candidate = Candidate(status=status, reason=reason)
    found = Evidence(ops={"rms_norm": {"pytorch": TIMED, "triton": candidate}})
    once = lasting(found)
    assert (once.ops, once.finished) == ({"rms_norm": {"pytorch": TIMED}}, False)
    again = lasting(found.model_copy(update={"doubted": once.doubted}))
    assert (again.ops, again.finished) == (found.ops, True)


def test_what_will_not_pass_is_believed_at_once() -> None:
    found = Evidence(
        ops={"rms_norm": {"a": Candidate(status="wrong", reason="2 % off"), "b": Candidate(status="crashed")}},
        trials=[trial("c", "failed", "another gradient")],
        step=answer("pytorch", "the plan that was left does not run as a whole: killed by SIGSEGV"),
    )
    assert lasting(found) == found


@pytest.mark.parametrize(
    "change",
    [
        {"trials": [trial("triton", "failed", "out of memory in the step: 20 GiB")]},
        {"step": answer("pytorch", "the plan that was left does not run as a whole: out of memory in the step")},
        {"default_runs": False, "step_reason": "the default plan in the step: the process was killed by SIGKILL"},
    ],
)
def test_so_it_is_in_the_step(change: dict[str, Any]) -> None:
    found = Evidence(ops={"rms_norm": {"pytorch": TIMED}}, **change)
    once = lasting(found)
    assert (once.trials, once.step, once.default_runs, once.finished) == ([], None, True, False)
    assert lasting(found.model_copy(update={"doubted": once.doubted})).finished


def test_what_was_not_tried_is_not_kept() -> None:
    found = Evidence(ops={"rms_norm": {"pytorch": Candidate(status="not_tried")}}, finished=False)
    assert lasting(found).ops == {}


def test_tuning_goes_on_with_what_is_known(norms: Workload) -> None:
    task = Task.of("rms_norm", norms.by_op()["rms_norm"], ["pytorch", "triton"], measure=True)
    trials = [trial("triton", "accepted")]
    whole = Evidence(ops={"rms_norm": {"pytorch": TIMED, "triton": TIMED}}, trials=trials, finished=False)
    findings = findings_of(whole, [task])
    assert (findings.left([task]), findings.trials) == ([], trials)
    findings = findings_of(Evidence(ops={"rms_norm": {"pytorch": TIMED}}, finished=False), [task])
    (left,) = findings.left([task])  # all are timed together
    assert (left.verify, set(left.verified), left.measure) == (["triton"], {"pytorch"}, True)
    untimed = Evidence(ops={"rms_norm": {"pytorch": TIMED, "triton": Candidate(status="verified")}}, finished=False)
    (left,) = findings_of(untimed, [task]).left([task])
    assert (left.verify, left.measure) == ([], True)


def test_an_earlier_answer_stands_until_something_speaks_against_it() -> None:
    before = Evidence(ops={}, step=answer("triton"), finished=False)
    verified = {"rms_norm": {"pytorch": TIMED, "triton": TIMED}}

    def now(**found: Any) -> StepEvidence | None:
        return evidence_of(Findings(**{"ops": verified, "cut_short": "no time"} | found), before, finished=True).step

    assert now() == before.step
    assert now(step=answer("pytorch")) == answer("pytorch")
    assert now(trials=[trial("triton", "failed")]) is None
    assert now(ops={"rms_norm": {"triton": Candidate(status="wrong")}}) is None
    assert now(default_runs=False) is None
