"""Compiling ahead, seen from those who wait for it: what they wait for, and that nobody waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from llmmed.autotune import child, process_settings, warming, worker
from llmmed.autotune.board import ALL, CLOCK, STEP, Board
from llmmed.autotune.child import Findings, Limits
from llmmed.autotune.journal import Begun, Event, Job, JournalReader, JournalWriter, StepTask, Task
from llmmed.autotune.plan import Candidate
from llmmed.autotune.tuner import tune
from llmmed.autotune.warming import Warming, warming_processes
from llmmed.autotune.worker import Worker
from llmmed.autotune.workload import Workload
from llmmed.compose import as_dict
from llmmed.config import Config
from llmmed.kernels.base import Implementation
from llmmed.kernels.catalog import get_op
from llmmed.processes import end, started_process


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path / "warm")


@pytest.fixture
def job(make_job: Callable[..., Job], norms: Workload, tmp_path: Path) -> Job:
    task = Task.of("rms_norm", norms.by_op()["rms_norm"], ["pytorch"], measure=True)
    return make_job(tasks=[task], warm=tmp_path / "warm")


@pytest.fixture
def main(job: Job, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The tuning process's `main`, in this process, with a job."""
    monkeypatch.setattr(worker.os, "_exit", lambda code: None)
    for name in ("end_with_parent", "offer_to_out_of_memory_killer"):
        monkeypatch.setattr(worker, name, lambda: None)
    monkeypatch.setattr(worker, "take_settings", lambda job: None)
    path = job.journal.with_name("job.json")
    monkeypatch.setattr(worker.sys, "argv", ["worker", str(path)])

    def run(age: float = 0.0, **change: object) -> None:
        job.model_copy(update={"warm": None} | change).write(path)
        os.utime(path, (time.time() - age,) * 2)
        worker.main()

    return run


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], stdin=subprocess.PIPE, start_new_session=True
    )
    yield process
    end(process)


def test_an_op_waits_for_its_own_units_and_for_those_on_the_gpu(board: Board) -> None:
    assert board.is_awaited(ALL, "rotary")  # not even begun
    board.announce({ALL: 1, CLOCK: 1, "rotary": 1, "swiglu": 2})
    board.finish("rotary", "1", "")
    assert board.is_awaited(ALL, "rotary")
    board.finish(ALL, "0", "")
    board.finish(STEP, "default", "")
    assert not board.is_awaited(ALL, "rotary")
    assert board.is_awaited(ALL, "swiglu")
    for name in ("2", "3"):
        board.finish("swiglu", name, "")
    assert not board.is_awaited(ALL, "swiglu")
    assert board.is_awaited()
    board.end()
    assert not board.is_awaited()


def test_nobody_waits_for_those_who_have_died_or_hang(
    board: Board, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(warming, "time", SimpleNamespace(perf_counter=lambda: now))
    board.announce({ALL: 3})
    warm = Warming(board, {sleeper: Path("log")})
    for unit in ("0", "1"):
        now += 40.0
        warm.look()
        assert board.is_awaited()
        board.finish(ALL, unit, "")  # slow, but it goes on
        board.finish(STEP, unit, "")
        warm.look()
    now += 46.0
    warm.look()
    assert not board.is_awaited()
    assert sleeper.returncode == -signal.SIGKILL


def test_those_who_are_done_may_go_on_with_the_step(board: Board, sleeper: subprocess.Popen[bytes]) -> None:
    board.announce({ALL: 1})
    board.finish(ALL, "0", "")
    Warming(board, {sleeper: Path("log")}, 0.0).look()
    assert sleeper.poll() is None


def test_all_are_looked_after_though_one_goes_on(board: Board, sleeper: subprocess.Popen[bytes]) -> None:
    """What takes the place of a process that a template has not forked is started when that is looked at."""
    second = Mock(**{"poll.return_value": None})
    Warming(board, {sleeper: Path("log"), second: Path("log")}).look()
    second.poll.assert_called_once_with()


def test_one_that_dies_is_told_of(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else would show it: what it left undone is compiled by those who judge, and takes them longer."""
    monkeypatch.setattr(warming, "warming_processes", lambda job: 1)
    told = job.model_copy(update={"tasks": [job.tasks[0].model_copy(update={"op": "no_such_op"})]})
    with caplog.at_level("INFO"), Warming.started(told, tmp_path, 60.0) as warm:
        (process,) = warm._processes
        assert process.wait(60) == 1
    assert "a process that compiled ahead ended with exit code 1" in caplog.text
    assert "no_such_op" in caplog.text


def test_only_the_cores_that_are_ours_are_taken(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    many = job.model_copy(
        update={"device": "cuda", "tasks": [t.model_copy(update={"verify": ["x"] * 40}) for t in job.tasks]}
    )
    found = []
    for count in (2, 4, 64):
        monkeypatch.setattr(warming, "cores", lambda count=count: count)
        found.append(warming_processes(many))
    assert found == [0, 3, 15]
    assert warming_processes(job) == 0


def test_verdicts_wait_for_their_units_and_times_for_all(
    job: Job, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_settle", lambda: None)
    board.announce({ALL: 1, "rms_norm": 1, CLOCK: 1})
    reader, stages = JournalReader(job.journal), list[str]()

    def begun() -> list[str]:
        events: list[Event] = list(reader.read())
        stages.extend(event.stage for event in events if isinstance(event, Begun))
        return stages

    def until(stage: str) -> list[str]:
        while stage not in begun():
            time.sleep(0.01)
        return stages

    with JournalWriter(job.journal) as journal:
        thread = threading.Thread(target=Worker(job, journal).run, daemon=True)
        thread.start()
        assert until("warm") == ["warm"]
        board.finish(ALL, "0", "")
        assert begun() == ["warm"]
        board.finish("rms_norm", "1", "")
        until("verify")
        while stages.count("warm") < 2:
            begun()
        time.sleep(0.05)
        assert begun() == ["warm", "verify", "warm"]
        board.finish(CLOCK, "2", "")
        thread.join(60)
    assert begun()[3:5] == ["load", "measure"]


@pytest.mark.parametrize(
    ("asked_for", "order"),
    [((), ["swiglu", "rotary", "attention"]), (("attention", "rotary"), ["attention", "rotary", "swiglu"])],
)
def test_no_op_waits_for_what_only_another_needs(
    asked_for: tuple[str, ...], order: list[str], job: Job, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what was asked for comes first, since without its verdict the run cannot begin."""
    names = sorted(("attention", "rotary", "swiglu"), key=lambda op: op not in asked_for)
    tasks = [job.tasks[0].model_copy(update={"op": op, "measure": op not in asked_for}) for op in names]
    board.announce({ALL: 1, "attention": 1, "rotary": 1, "swiglu": 1, CLOCK: 1})
    board.finish("swiglu", "2", "")
    ends = iter([(ALL, "0"), ("rotary", "1"), ("attention", "3")])
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: board.finish(*next(ends), ""))
    with JournalWriter(job.journal) as journal:
        assert [task.op for task in Worker(job, journal)._as_compiled(tasks)] == order
    waits = [event.stage for event in JournalReader(job.journal).read() if isinstance(event, Begun)]
    assert waits == ["warm"] * (1 if asked_for else 3)


def test_without_room_for_both_all_is_compiled_first(job: Job, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "has_room", lambda device: False)
    board.announce({ALL: 1, "rms_norm": 1, CLOCK: 1})
    for awaited_by in (ALL, "rms_norm"):
        board.finish(awaited_by, "0", "")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        board.finish(CLOCK, "1", "")

    monkeypatch.setattr(worker.time, "sleep", sleep)
    with JournalWriter(job.journal) as journal:
        assert [task.op for task in Worker(job, journal)._as_compiled(job.tasks)] == ["rms_norm"]
    assert len(waited) == 1


def test_the_time_that_a_process_takes_to_start_counts(
    main: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent ends it in time, and until then it must have come to an end of its own."""
    left: list[float] = []
    monkeypatch.setattr(worker, "_settle", lambda: None)
    monkeypatch.setattr(Worker, "run", lambda self: left.append(self._deadline - time.perf_counter()))
    main(age=12.0, seconds=60.0)
    assert left == [pytest.approx(48.0, abs=1.0)]


def test_what_is_there_for_good_is_no_garbage_to_look_through(
    main: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(worker.gc, "collect", lambda: done.append("collect"))
    monkeypatch.setattr(worker.gc, "freeze", lambda: done.append("freeze"))
    monkeypatch.setattr(Worker, "_verify", lambda *arguments: done.append("verify") or Candidate(status="wrong"))
    monkeypatch.setattr(Worker, "_confirm", lambda *arguments: done.append("step"))
    main(step=StepTask(config={}, pinned={}, known={}))
    assert done == ["collect", "freeze", "verify", "collect", "freeze", "step"]


def test_the_search_for_launches_is_shared(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one leaves is for those that follow, and nobody takes it all."""
    now, quick = 0.0, {"b"}
    got: dict[str, float] = {}

    def search(op: Any, implementation: Implementation, *rest: Any, time_is_up: Callable[[], bool], **more: Any) -> Any:
        nonlocal now
        began = now
        while not time_is_up() and not (implementation.name in quick and now > began):
            now += 0.01
        got[implementation.name] = now - began
        return []

    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(worker, "search_launches", search)
    monkeypatch.setattr(worker, "_can_be_searched", lambda op, name: True)
    monkeypatch.setattr(worker, "get_implementation", lambda op, name: Implementation(name, load=lambda: search))
    monkeypatch.setattr(worker, "load_function", lambda op, implementation: search)
    task = job.tasks[0]
    with JournalWriter(job.journal) as journal:
        working = Worker(job.model_copy(update={"searching_seconds": 6.0, "warm": None}), journal)
        working._searches_left = 3
        for name in ("a", "b", "c"):
            working._find_launches(get_op("rms_norm"), name, Candidate(status="verified"), task.counts(), task)
    assert got == pytest.approx({"a": 2.0, "b": 0.01, "c": 4.0}, abs=0.05)


def test_a_restart_searches_no_longer_than_is_left() -> None:
    limits = Limits(candidate_seconds=90.0, budget_seconds=240.0, deadline=0.0)
    assert child._searching_seconds(limits, Findings()) == 5.0
    assert child._searching_seconds(limits, Findings(seconds={"launch": 4.0})) == 1.0
    assert child._searching_seconds(limits, Findings(seconds={"launch": 9.0})) == 0.0


def test_a_warm_up_process_does_not_outlive_its_parent(job: Job, board: Board, tiny: Config, tmp_path: Path) -> None:
    """As a tuning process does not; it would hold the GPU's memory."""
    for part in range(3):
        board.claim(f"{STEP}-default-{part}")  # by processes that never get done: this one waits for them
    step = StepTask(config=as_dict(tiny), pinned={}, known={})
    job.model_copy(update={"mode": "compiled", "tasks": [], "step": step}).write(tmp_path / "job.json")
    arguments = [str(tmp_path / "job.json"), str(tmp_path / "warm")]
    with started_process("llmmed.autotune.warm", arguments, tmp_path / "log") as process:
        while board.is_awaited():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=10) == -signal.SIGKILL


def test_processes_are_forks_of_one_that_has_imported_what_they_need(
    tiny: Config, norms: Workload, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The one that judges, those that compile ahead, and the next after a candidate that has killed them."""
    plant("dies", "leaves", "right")
    for module in (child, warming):
        monkeypatch.setattr(module, "warming_processes", lambda job: 2)
    monkeypatch.setattr(child, "compiles_ahead", lambda device: True)
    started: list[list[str]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], *args: Any, **kwargs: Any) -> None:
            super().__init__(command, *args, **kwargs)
            started.append(command[4:])

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with caplog.at_level("INFO"):
        plan = tune(tiny, norms, mode="eager")
    assert started == [["llmmed.template", *child._IMPORTED]]
    found = {name: (each.status, each.reason) for name, each in plan.ops["rms_norm"].candidates.items()}
    assert found["right"][0] == found["pytorch"][0] == "verified"
    assert found["dies"] == ("crashed", "the process was killed by SIGSEGV while it was verified")
    assert found["leaves"][1] == "the process ended with exit code 1 while it was verified: enough of this"
    assert "a process that compiled ahead was killed by SIGSEGV" in caplog.text


@pytest.mark.parametrize(("device", "count", "forks"), [("cuda", 4, True), ("cuda", 3, False), ("cpu", 16, False)])
def test_processes_may_be_begun_with_before_tuning(
    device: str, count: int, forks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there will be many. Until the context ends: a plan that is found in the cache needs none."""
    (tmp_path / "light.py").write_text("import os\nNUMBER = os.getpid()\ndef main(): print(NUMBER)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(child, "_IMPORTED", ["light"])
    monkeypatch.setattr(warming, "cores", lambda: count)
    log = tmp_path / "log"
    with child.processes_to_come(device) as start, start("light", [], log) as process:
        assert process.wait(20) == 0
        imported_by = int(log.read_text())
        assert (imported_by != process.pid) == forks
    with pytest.raises(ProcessLookupError):
        os.kill(imported_by, 0)


def test_a_process_that_starts_over_is_told_of(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "refuses.py").write_text(
        "import sys\nfrom llmmed.template import STARTS_OVER\n"
        "def main():\n    print(f'{STARTS_OVER}: no GPU')\n    sys.exit(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    limits = Limits(candidate_seconds=20, budget_seconds=20, deadline=time.perf_counter() + 20)
    with caplog.at_level("INFO"):
        child.tune_in_child(
            job.tasks, device="cpu", mode="eager", deterministic=False, step=None, limits=limits,
            report=lambda progress: None,
            start=lambda module, arguments, log, variables=None: started_process("refuses", arguments, log, variables),
        )  # fmt: skip
    assert "which takes longer: one starts over, since not all works in a fork: no GPU" in caplog.text


def test_a_fork_compiles_on_one_core_in_all_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes are compiled in another, which with torch 2.13 has settings of its own."""
    from torch._inductor import async_compile, config

    monkeypatch.setattr(config._config["compile_threads"], "default", 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    found: list[tuple[int, int]] = []
    try:
        process_settings.take_one_core()
        thread = threading.Thread(
            target=lambda: found.append((async_compile.get_compile_threads(), torch.get_num_threads()))
        )
        thread.start()
        thread.join()
        assert [*found, (async_compile.get_compile_threads(), torch.get_num_threads())] == [(1, 1), (1, 1)]
    finally:
        torch.set_num_threads(threads)


def test_a_deterministic_run_is_compiled_ahead_deterministically(
    job: Job, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(process_settings, "take_deterministic_kernels", lambda: taken.append("deterministic"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", taken.append)
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        process_settings.take_settings(job)
        process_settings.take_settings(job.model_copy(update={"deterministic": True, "matmul_precision": "high"}))
        assert torch._dynamo.config.recompile_limit >= 1024
    assert taken == ["highest", "high", "deterministic"]
