"""The tuning process's parts: the journal survives half a line, errors get their status, what is done stays done."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmmed.autotune import child, worker
from llmmed.autotune.child import Findings, Limits
from llmmed.autotune.failures import classify, one_line
from llmmed.autotune.journal import (
    LAST_MATCH,
    Begun,
    Done,
    Event,
    Job,
    JournalReader,
    JournalWriter,
    Judged,
    StepDone,
    StepExpected,
    StepTask,
    Task,
    Timed,
)
from llmmed.autotune.plan import Candidate, Ceilings, Status, StepEvidence, StepTimes, StepTrial
from llmmed.autotune.step_clock import StepClock
from llmmed.autotune.worker import Worker
from llmmed.autotune.workload import Workload
from llmmed.compose import as_dict
from llmmed.config import Config
from llmmed.kernels.base import Op, Unavailable
from llmmed.kernels.operator import in_compiled_step

VERIFIED = Candidate(status="verified", relative_error=1e-7)
TIMED = VERIFIED.model_copy(update={"total_ms": 1.0})


def task(norms: Workload, *names: str, measure: bool = True) -> Task:
    return Task.of("rms_norm", norms.by_op()["rms_norm"], list(names), measure=measure)


def test_the_journal_gives_every_event_once_and_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    reader = JournalReader(path)
    assert list(reader.read()) == []
    events: list[Event] = [
        Begun(stage="verify", op="rms_norm", name="triton"),
        Judged(op="rms_norm", name="triton", candidate=VERIFIED),
        Timed(op="rms_norm", candidates={"triton": TIMED}),
        Done(),
    ]
    with JournalWriter(path) as writer:
        writer.write(events[0])
        assert list(reader.read()) == events[:1]
        with path.open("a") as file:
            file.write(events[1].model_dump_json()[:20])
        assert list(reader.read()) == []
        with path.open("a") as file:
            file.write(events[1].model_dump_json()[20:] + "\n")
        writer.write(events[2])
        writer.write(events[3])
    assert list(reader.read()) == events[1:]
    assert list(reader.read()) == []


def test_a_job_survives_the_disk(make_job: Callable[..., Job], tmp_path: Path, norms: Workload) -> None:
    job = make_job(
        deterministic=True,
        tasks=[task(norms, "pytorch", "triton").model_copy(update={"verified": {"liger": VERIFIED}})],
        ceilings=Ceilings(copy_gb_per_second=3000),
    )
    job.write(tmp_path / "job.json")
    read = Job.read(tmp_path / "job.json")
    assert read == job
    assert read.tasks[0].counts() == norms.calls


def test_what_is_done_is_not_done_again(norms: Workload) -> None:
    tasks = [task(norms, "pytorch", "dies", "triton")]
    findings = Findings()
    assert findings.left(tasks) == tasks
    findings.add(Judged(op="rms_norm", name="pytorch", candidate=VERIFIED))
    findings.add(Judged(op="rms_norm", name="dies", candidate=Candidate(status="crashed")))
    (left,) = findings.left(tasks)
    assert (left.verify, left.verified, left.measure) == (["triton"], {"pytorch": VERIFIED}, True)
    findings.add(Judged(op="rms_norm", name="triton", candidate=VERIFIED))
    (left,) = findings.left(tasks)
    assert (left.verify, set(left.verified)) == ([], {"pytorch", "triton"})
    findings.add(Timed(op="rms_norm", candidates={"pytorch": TIMED, "triton": TIMED}))
    assert findings.left(tasks) == []


class Ended:
    """A process that has died of a segmentation fault."""

    returncode = -signal.SIGSEGV

    def poll(self) -> int:
        return self.returncode


STEP = StepEvidence(
    trial_depth=2, depths=(1, 2), trials=[], reason="", mode="eager",
    default=StepTimes(choice={}, ms=2.0, ms_low=2.0, ms_high=2.0, peak_memory_gib=None),
    chosen=StepTimes(choice={}, ms=1.0, ms_low=1.0, ms_high=1.0, peak_memory_gib=None),
)  # fmt: skip


@pytest.mark.parametrize("answered", [False, True])
def test_a_death_in_the_last_match_is_not_the_defaults_fault(
    answered: bool, make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "end", lambda process: None)
    step = StepTask(config={}, pinned={}, known={})
    job = make_job(step=step)
    with JournalWriter(job.journal) as writer:
        writer.write(Begun(stage="step"))
        writer.write(StepExpected(evidence=STEP))
        if answered:
            writer.write(StepDone(evidence=STEP))
        writer.write(Begun(stage="step", name="compiled" if answered else LAST_MATCH))
    (tmp_path / "log").write_text("")
    findings, limits = Findings(), Limits(60.0, 60.0, time.perf_counter() + 60.0)
    attempt = child._Attempt(job, [], findings, limits, lambda progress: None, None, None)
    assert attempt.follow(Ended(), tmp_path / "log") == ""  # type: ignore[arg-type]
    assert findings.default_runs
    assert findings.step == (STEP if answered else None)
    left = child._confirmation(step, findings)
    if answered:
        assert left is None
    else:
        assert left is not None
        assert left.last_match_died == "the process was killed by SIGSEGV while it was tried in the step"
        assert findings.expected is None  # a later process that runs out of time must not take it


@pytest.mark.parametrize("answered", [False, True])
def test_where_the_last_match_finds_no_time_the_trials_decide(
    answered: bool, make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "end", lambda process: None)
    job = make_job(step=StepTask(config={}, pinned={}, known={}))
    by_trials = STEP.model_copy(update={"reason": "by trials", "finished": False})
    with JournalWriter(job.journal) as writer:
        writer.write(StepExpected(evidence=by_trials))
        if answered:
            writer.write(StepDone(evidence=STEP))
        writer.write(Begun(stage="step", name="compiled" if answered else LAST_MATCH))
    (tmp_path / "log").write_text("")
    findings, limits = Findings(), Limits(60.0, 60.0, time.perf_counter())
    attempt = child._Attempt(job, [], findings, limits, lambda progress: None, None, None)
    assert "kernels.budget_seconds=60 was used up" in attempt.follow(Ended(), tmp_path / "log")  # type: ignore[arg-type]
    assert findings.step == (STEP.model_copy(update={"finished": False}) if answered else by_trials)


def test_a_trial_counts_as_long_as_its_implementation_is_verified() -> None:
    """One that an earlier run accepted may have failed in this one's measurement."""
    trials = [
        StepTrial(op="rms_norm", name=name, against="pytorch", status="accepted", reason="") for name in ("a", "b")
    ]
    findings = Findings(ops={"rms_norm": {"a": TIMED, "b": Candidate(status="crashed")}}, trials=trials)
    left = child._confirmation(StepTask(config={}, pinned={}, known={}), findings)
    assert left is not None
    assert left.trials == trials[:1]


def test_what_is_not_to_be_measured_is_done_once_judged(norms: Workload) -> None:
    findings = Findings()
    findings.add(Judged(op="rms_norm", name="triton", candidate=VERIFIED))
    assert findings.left([task(norms, "triton", measure=False)]) == []
    assert findings.left([task(norms, "triton", measure=True)]) != []


@pytest.mark.parametrize(("mode", "compiled"), [("eager", False), ("compiled", True), ("graphs", True)])
def test_launches_and_times_are_those_of_the_runs_step(
    mode: str, compiled: bool, norms: Workload, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def find_launches(worker: Worker, op: Op, name: str, candidate: Candidate, *rest: object) -> Candidate:
        seen.append(in_compiled_step())
        return candidate

    monkeypatch.setattr(Worker, "_find_launches", find_launches)
    monkeypatch.setattr(Worker, "_measure", lambda worker, *rest: seen.append(in_compiled_step()))
    known = task(norms).model_copy(update={"verified": {"triton": VERIFIED}})
    job = make_job(mode=mode, tasks=[known])
    with JournalWriter(job.journal) as journal:
        Worker(job, journal).run()
    assert seen == [compiled, compiled]
    assert not in_compiled_step()


def hidden(error: Exception, cause: Exception) -> Exception:
    error.__context__ = cause
    return error


class CompilationError(Exception):
    __module__ = "triton.compiler.errors"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "out_of_memory", "out of memory"),
        (MemoryError(), "out_of_memory", "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out_of_memory", "out of memory"),
        (hidden(RuntimeError("the capture is broken off"), MemoryError()), "out_of_memory", "out of memory"),
        (Unavailable("no licence"), "unavailable", "no licence"),
        (
            CompilationError("at 3:1:\n  y = x.no\n  ^\nno such name"),
            "failed_to_compile",
            "CompilationError: no such name",
        ),
        (torch._dynamo.exc.Unsupported("graph break"), "failed_to_compile", "Unsupported: graph break"),
        (ValueError("boom\nmore"), "crashed", "ValueError: boom"),
    ],
)
def test_an_error_has_its_status(error: Exception, status: Status, reason: str) -> None:
    found = classify(error)
    assert found[0] == status
    assert found[1].startswith(reason)


def test_an_error_is_one_short_line() -> None:
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("x" * 500), limit=50) == "ValueError: " + "x" * 35 + "..."


def test_what_a_compiler_says_of_a_called_function_is_told() -> None:
    """Triton says where the call is, with nothing below it, and the reason in the cause."""
    outer = RuntimeError("at 19:19:\n    held = held_columns(x)\n           ^")
    assert one_line(outer) == "RuntimeError: held = held_columns(x)"
    outer.__cause__ = NameError("at 2:4:\n    return y\n    ^\ny is not defined")
    assert one_line(outer) == "NameError: y is not defined"


def test_what_the_trials_say_reaches_the_journal(
    tiny: Config, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = (
        VERIFIED.model_copy(update={"total_ms": ms, "total_ms_low": ms, "total_ms_high": ms}) for ms in (1.0, 0.5)
    )
    known = {"rms_norm": {"pytorch": slow, "triton": fast}}
    job = make_job(step=StepTask(config=as_dict(tiny), pinned={}, known=known))
    monkeypatch.setattr(StepClock, "__init__", lambda *args: None)
    monkeypatch.setattr(worker, "confirm", lambda *args, expected, **options: expected(STEP))
    with JournalWriter(job.journal) as journal:
        Worker(job, journal).run()
    assert StepExpected(evidence=STEP) in list(JournalReader(job.journal).read())


def test_time_is_kept_for_a_trial_and_for_the_last_match(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = 0.0

    def takes(seconds: float) -> Callable[..., None]:
        def wait(*args: object, **options: object) -> None:
            nonlocal now
            now += seconds

        return wait

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now)
    monkeypatch.setattr(StepClock, "__init__", lambda *args: None)
    with JournalWriter(tmp_path / "journal.jsonl") as journal:
        clock = worker._Announcing(tiny, "eager", {}, journal)
        assert clock.reserve == 6
        for whole, duel, reserve in ((20.0, 1.0, 23.0), (5.0, 12.0, 32.0), (1.0, 1.0, 32.0)):
            monkeypatch.setattr(StepClock, "whole", takes(whole))
            monkeypatch.setattr(StepClock, "duel", takes(duel))
            clock.whole({}, {})
            clock.duel({}, "rms_norm", "triton")
            assert clock.reserve == reserve
