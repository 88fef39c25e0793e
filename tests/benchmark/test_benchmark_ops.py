"""`benchmark=ops`: what it verifies and measures, and what a wrong or broken candidate looks like in it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmmed.autotune import warm, worker
from llmmed.autotune.child import Findings
from llmmed.autotune.journal import Job, JournalWriter, Task
from llmmed.autotune.plan import Candidate
from llmmed.autotune.verify import Verdict
from llmmed.autotune.workload import record_workload
from llmmed.benchmark import ops
from llmmed.benchmark.page import write_page
from llmmed.benchmark.results import OpsResult
from llmmed.benchmark.settings import compose_benchmark
from llmmed.reporting import benchmark_plots
from tests.benchmark.samples import TINY, benchmark


@pytest.mark.slow
def test_every_candidate_has_its_numbers_or_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None]
) -> None:
    plant("right", "wrong", "dies_when_measured")
    passes: list[list[Task]] = []
    real = ops.tune_in_child

    def spy(tasks: list[Task], **given: Any) -> Any:
        passes.append(tasks)
        return real(tasks, **given)

    monkeypatch.setattr(ops, "tune_in_child", spy)
    folder = tmp_path / "out"
    small = [*(o for o in TINY if not o.startswith("model=")), "model.n_layers=1", "sizes=tiny,small"]
    result, shown = benchmark(folder, *small, "ops=rms_norm", "peers=false")
    assert isinstance(result, OpsResult)
    found = {(row.op, row.size, row.implementation): row for row in result.rows}
    assert not [key for key in found if key[2] == "liger"]
    for size in ("tiny", "small"):
        norm, right = found["rms_norm", size, "pytorch"], found["rms_norm", size, "right"]
        assert norm.status == right.status == "verified"
        assert norm.total_ms is not None
        assert right.total_ms is not None
        assert right.speedup == pytest.approx(norm.total_ms / right.total_ms)
        assert right.speedup_low is not None
        assert right.speedup_high is not None
        assert right.speedup_low < right.speedup < right.speedup_high
        wrong, dead = found["rms_norm", size, "wrong"], found["rms_norm", size, "dies_when_measured"]
        assert wrong.status == "wrong"
        assert "relative error" in wrong.reason
        assert dead.status == "crashed"
        assert "SIGSEGV" in dead.reason
        assert wrong.total_ms is dead.total_ms is None
        assert "CUDA" in found["rms_norm", size, "triton"].reason
    assert "x 2x16x384 float32" in found["rms_norm", "small", "pytorch"].shapes
    assert "(at size tiny)" in found["rms_norm", "small", "wrong"].reason

    first, second = ({task.op: task for task in tasks} for tasks in passes)
    assert "pytorch" in first["rms_norm"].verify
    assert set(second["rms_norm"].verify) == set(second["rms_norm"].at_own_calls) == {"pytorch", "right"}
    assert norm.relative_error != found["rms_norm", "tiny", "pytorch"].relative_error

    assert "SIGSEGV" in shown
    assert OpsResult.model_validate(json.loads((folder / "ops.json").read_text())) == result
    with (folder / "ops.csv").open() as file:
        assert [row["implementation"] for row in csv.DictReader(file)] == [row.implementation for row in result.rows]
    assert (folder / "ops_time_float32_eager.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks of `benchmark=ops`, whose processes are not started: what they verify is right and timed."""
    tasks: list[Task] = []

    def child(given: list[Task], **_: object) -> Findings:
        tasks.extend(given)
        error = 1e-3 * len(tasks)
        timed = {"total_ms": 1.0, "total_ms_low": 0.9, "total_ms_high": 1.1}
        ops = {
            task.op: {
                name: known.model_copy(update=timed)
                for name, known in (
                    task.verified
                    | {name: Candidate(status="verified", relative_error=error) for name in task.verify}
                ).items()
            }
            for task in given
        }  # fmt: skip
        return Findings(ops=ops, measured={task.op for task in given})

    monkeypatch.setattr(ops, "tune_in_child", child)
    monkeypatch.setattr(benchmark_plots, "draw", lambda *_: [])
    return tasks


SIZES_OF = ["device=cpu", "train.seq_len=16", "train.micro_batch_size=2", "tokenizer.vocab_size=300", "peers=false"]


def test_nothing_is_timed_at_a_size_at_which_it_was_not_verified(tmp_path: Path, tuned: list[Task]) -> None:
    result, _ = benchmark(tmp_path, *SIZES_OF, "sizes=tiny,small", "ops=rms_norm", "modes=eager,compiled")
    assert isinstance(result, OpsResult)
    tiny, tiny_again, small, small_again = tuned
    assert "pytorch" in tiny.verify
    assert tiny.at_own_calls == []
    assert small.verify == small.at_own_calls == tiny.verify
    for again, before in ((tiny_again, tiny), (small_again, small)):
        assert again.verify == []
        assert set(again.verified) <= set(before.verify)
    errors = {(row.size, row.mode): row.relative_error for row in result.rows if row.implementation == "pytorch"}
    assert errors == {
        ("tiny", "eager"): 1e-3, ("tiny", "compiled"): 1e-3, ("small", "eager"): 3e-3, ("small", "compiled"): 3e-3
    }  # fmt: skip


def test_sizes_with_the_same_calls_have_a_row_each(tmp_path: Path, tuned: list[Task]) -> None:
    size = ["sizes=tiny,small", "model.d_model=64", "model.n_heads=4", "model.d_ff=192"]
    result, shown = benchmark(tmp_path, *SIZES_OF, *size, "ops=rms_norm", "dtypes=float32,bfloat16")
    assert isinstance(result, OpsResult)
    assert len(tuned) == 2  # one for each dtype
    rows = {(row.size, row.dtype): row for row in result.rows if row.implementation == "pytorch"}
    assert set(rows) == {(s, d) for s in ("tiny", "small") for d in ("float32", "bfloat16")}
    assert {row.total_ms for row in rows.values()} == {1.0}
    assert rows["tiny", "float32"].reason == ""
    assert rows["small", "bfloat16"].reason == "the same calls as tiny in bfloat16, measured there"
    assert rows["small", "bfloat16"].relative_error == rows["tiny", "bfloat16"].relative_error
    assert "the same calls as tiny in float32" in shown


def test_the_cases_are_left_out_for_what_has_passed_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, config = compose_benchmark([*TINY, "model.n_layers=1"])
    calls = record_workload(config).by_op()["rms_norm"]
    given: dict[str, Any] = {}

    def judged(op: Any, implementation: Any, *_: object, **named: Any) -> Verdict:
        given[implementation.name] = named["cases"]
        return Verdict("verified", "", 0.0, 0.0, 1)

    monkeypatch.setattr(worker, "verify", judged)
    task = Task.of("rms_norm", calls, ["pytorch", "compiled"], measure=False)
    task = task.model_copy(update={"at_own_calls": ["compiled"]})
    job = Job(journal=tmp_path / "journal", device="cpu", mode="eager", deterministic=False, matmul_precision="highest",
              tasks=[task], seconds=10.0)  # fmt: skip
    with JournalWriter(job.journal) as journal:
        worker.Worker(job, journal).run()
    assert given == {"pytorch": None, "compiled": ()}
    ahead = {(unit.name, unit.call) for unit in warm._units([task], "eager", torch.device("cpu"))}
    assert {call for name, call in ahead if name == "compiled"} == set(calls)


def test_without_time_everything_is_in_the_table_as_not_tried(tmp_path: Path) -> None:
    result, _ = benchmark(tmp_path, *TINY, "ops=rms_norm", "seconds=1e-3")
    assert {row.status for row in result.rows} == {"not_tried", "unavailable"}
    assert all("seconds=0.001 was used up" in row.reason for row in result.rows if row.status == "not_tried")
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_a_benchmark_that_is_killed_leaves_the_ops_that_it_has_done(
    tmp_path: Path, repository: Path, plant: Callable[..., None]
) -> None:
    plant("slow")  # of `rms_norm`: it takes longer than one needs to see that `swiglu` is done
    ours = [*TINY, "ops=swiglu,rms_norm,rotary", "peers=false", "hydra.run.dir=out"]
    command = [sys.executable, str(repository / "scripts" / "benchmark.py"), *ours]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (tmp_path / "out" / "ops.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    result = OpsResult.model_validate(json.loads((tmp_path / "out" / "ops.json").read_text()))
    done = list(dict.fromkeys(row.op for row in result.rows))
    assert done == ["swiglu", "rms_norm", "rotary"][: len(done)]
    assert 1 <= len(done) <= 2, "it was over before it was killed"
    assert next(row for row in result.rows if row.implementation == "pytorch").total_ms is not None
    write_page([tmp_path / "out"], tmp_path / "page.md")
    assert "### swiglu" in (tmp_path / "page.md").read_text()
