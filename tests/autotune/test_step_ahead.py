"""Which plans are compiled ahead of the step, and in what order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
import torch

from llmmed.autotune import step_ahead
from llmmed.autotune.board import STEP, Board
from llmmed.autotune.confirm import Choice
from llmmed.autotune.journal import Event, Job, JournalWriter, Judged, StepDone, StepTask, Task, Timed, Tried
from llmmed.autotune.plan import Candidate, StepTrial
from llmmed.autotune.step_ahead import StepAhead
from llmmed.autotune.workload import record_workload
from llmmed.compose import as_dict
from llmmed.config import Config

VERIFIED = Candidate(status="verified")


@pytest.fixture
def job(make_job: Callable[..., Job], tiny: Config) -> Job:
    calls = record_workload(tiny).by_op()
    names = {"rotary": ["pytorch", "triton"], "swiglu": ["pytorch", "liger", "triton"]}
    return make_job(
        mode="compiled",
        tasks=[Task.of(op, calls[op], names[op], measure=True) for op in names],
        step=StepTask(config=as_dict(tiny), pinned={"attention": "triton"}, known={}),
    )


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path / "warm")


def flips(plan: Choice) -> dict[str, str]:
    return {op: name for op, name in plan.items() if name != "pytorch" and op != "attention"}


def compiled(
    job: Job, board: Board, monkeypatch: pytest.MonkeyPatch, events: Iterator[list[Event]]
) -> list[dict[str, str]]:
    """What one process compiles, while these events come, one list after each plan and whenever it has none."""
    plans: list[dict[str, str]] = []
    path = job.journal.with_name("journal0.jsonl")

    def arrive(seconds: float = 0.0) -> None:
        with JournalWriter(path) as journal:
            for event in next(events):
                journal.write(event)

    def compile_it(config: Config, plan: Choice, mode: str, parts: Collection[int]) -> None:
        assert plan["attention"] == "triton"
        assert len(parts) == (3 if flips(plan) else 1)
        assert updates == [job.mode] * bool(flips(plan))  # once, before the flips
        plans.append(flips(plan))
        if flips(plan) or len(plans) == 3:
            arrive()

    updates: list[str] = []
    monkeypatch.setattr(step_ahead, "compile_ahead", compile_it)
    monkeypatch.setattr(step_ahead, "compile_update_ahead", lambda config, mode: updates.append(mode))
    monkeypatch.setattr(step_ahead.time, "sleep", arrive)
    monkeypatch.setattr(step_ahead.os, "nice", lambda by: 0)
    step = StepAhead(job, board)
    step.compile_default()
    step.compile_flips()
    defaults = [plan for plan in plans if not plan]
    assert plans[: len(defaults)] == defaults  # what all share is compiled first
    return plans[len(defaults) :]


def timed(op: str, **total_ms: float) -> Timed:
    times = {name: VERIFIED.model_copy(update={"total_ms": ms}) for name, ms in total_ms.items()}
    return Timed(op=op, candidates=times)


def accepted(op: str, name: str) -> Tried:
    return Tried(trial=StepTrial(op=op, name=name, against="pytorch", status="accepted", reason=""))


DONE = StepDone(evidence=None, reason="enough")


def test_flips_of_the_default_are_compiled_until_one_is_accepted(
    job: Job, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejected = Judged(op="swiglu", name="liger", candidate=Candidate(status="wrong"))
    times = [timed("rotary", pytorch=1.0, triton=0.5), timed("swiglu", pytorch=1.0, triton=0.9)]
    events: list[list[Event]] = [[rejected], [], [], times, [accepted("rotary", "triton")], [], [DONE]]
    found = compiled(job, board, monkeypatch, iter(events))
    assert found[:2] == [{"rotary": "triton"}, {"swiglu": "triton"}]
    assert found[2:] == [{"rotary": "triton", "swiglu": "triton"}]  # beside the best that there is by now


def test_once_times_are_known_the_shortlist_decides(job: Job, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Judged(op=task.op, name=name, candidate=VERIFIED) for task in job.tasks for name in task.verify]
    times = [timed("rotary", pytorch=1.0, triton=9.0), timed("swiglu", pytorch=1.0, liger=1.1, triton=0.9)]
    events: list[list[Event]] = [[*verdicts, *times], [], [], [DONE]]
    found = compiled(job, board, monkeypatch, iter(events))
    assert found == [{"swiglu": "triton"}, {"swiglu": "liger"}]


def test_an_op_that_is_never_timed_holds_up_no_other(job: Job, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [timed("rotary", pytorch=1.0, triton=0.5)]
    none = [Judged(op="swiglu", name=n, candidate=Candidate(status="wrong")) for n in ("pytorch", "liger", "triton")]
    events: list[list[Event]] = [[*none, *times], [], [accepted("rotary", "triton")], [DONE]]
    assert compiled(job, board, monkeypatch, iter(events)) == [{"rotary": "triton"}]


def test_processes_share_the_plans_and_are_few(job: Job, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in range(3):
        assert board.claim(f"{STEP}-default-{part}")  # others compile the default plan, and are not done
    waits: list[list[Event]] = [[], [], [DONE]]
    assert compiled(job, board, monkeypatch, iter(waits)) == []
    for n in range(8):
        board.claim(f"{STEP}{n}")
    assert compiled(job, board, monkeypatch, iter([])) == []  # there are enough of them


def test_what_does_not_compile_says_so_and_the_rest_goes_on(
    job: Job, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Config, plan: Choice, mode: str, parts: Collection[int]) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(step_ahead, "compile_ahead", refuse)
    step = StepAhead(job, board)
    step.compile_default()
    (line,) = board.finished(STEP)
    assert line.endswith("the default plan, part 1 of 3: RuntimeError: no such thing")


def test_memory_is_limited_while_it_compiles_and_whatever_becomes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rule that torch itself has for a GPU: one without an index is not taken for the current one."""
    limits: list[tuple[float, int | None]] = []

    def limit(share: float, device: object = None) -> None:
        limits.append((share, device if device is None else torch.cuda._utils._get_device_index(device)))

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    for device, index in (("cuda", None), ("cuda:1", 1)):
        limits.clear()
        with pytest.raises(ValueError, match="does not compile"), step_ahead.little_memory(torch.device(device)):
            raise ValueError("does not compile")
        assert limits == [(step_ahead._MEMORY, index), (1.0, index)]
