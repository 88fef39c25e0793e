"""The warm-up: what it runs, and that processes share it without doing anything twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmmed.autotune import warm
from llmmed.autotune.board import ALL, CLOCK, Board
from llmmed.autotune.journal import Job, Task
from llmmed.autotune.launch_search import open_sites
from llmmed.autotune.plan import Candidate, Mode
from llmmed.autotune.trials import trials
from llmmed.autotune.workload import Workload
from llmmed.kernels.ahead_of_time import TARGETS
from llmmed.kernels.base import Call, Op
from llmmed.kernels.catalog import get_implementation, get_op
from llmmed.kernels.operator import INTERPRETED, absent_gpu
from llmmed.processes import started_process


@pytest.fixture
def job(make_job: Callable[..., Job], norms: Workload) -> Job:
    task = Task.of("rms_norm", norms.by_op()["rms_norm"], ["pytorch", "triton"], measure=True)
    return make_job(tasks=[task], mode="graphs", matmul_precision="high")


def test_every_trial_of_the_gate_is_covered(job: Job, norms: Workload) -> None:
    units = list(warm._units(job.tasks, job.mode, torch.device("cpu")))
    calls = list(norms.by_op()["rms_norm"])
    tried = {(t.call, t.layout) for t in trials(get_op("rms_norm"), calls, None, torch.device("cpu"))}
    covered = [(u.call, layout) for u in units if u.name == "triton" and not u.compiled for layout in u.layouts]
    assert set(covered) == tried
    assert len(covered) == len(tried)
    assert [u.call for u in units if u.compiled] == calls
    assert {u.name for u in units if u.compiled} == {"pytorch"}


def test_what_is_compiled_for_each_shape_is_run_for_real(norms: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors `torch.compile` would not meet the kernels that it is to write."""
    task = Task.of("rms_norm", norms.by_op()["rms_norm"], ["compiled"], measure=True)
    units = list(warm._units([task], "eager", torch.device("cpu")))
    calls = list(norms.by_op()["rms_norm"])
    tried = {t.call for t in trials(get_op("rms_norm"), calls, None, torch.device("cpu"), few_shapes=True)}
    assert {unit.call for unit in units if not unit.timed} == tried
    assert [unit.call for unit in units if unit.timed] == calls
    run: list[tuple[Call, str]] = []

    def run_once(op: Op, function: object, call: Call, device: torch.device) -> None:
        run.append((call, torch.get_float32_matmul_precision()))

    monkeypatch.setattr(warm, "run_once", run_once)
    monkeypatch.setattr(warm, "run_on_meta", None)
    torch.set_float32_matmul_precision("high")  # what the run takes; the gate's products are exact
    try:
        for unit in units:
            unit.run(torch.device("cpu"))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert run == [(unit.call, "high" if unit.timed else "highest") for unit in units]
    assert {unit.awaited_by for unit in units if unit.timed} == {CLOCK}
    assert {unit.awaited_by for unit in units if not unit.timed} == {ALL}


@pytest.mark.skipif(INTERPRETED, reason="nothing is searched under TRITON_INTERPRET=1")
def test_every_launch_of_the_search_is_covered(job: Job, norms: Workload) -> None:
    op, implementation, device = get_op("rms_norm"), get_implementation("rms_norm", "triton"), torch.device("cpu")
    with absent_gpu(TARGETS[90]):
        units = list(warm._units(job.tasks, job.mode, device))
        opened = open_sites(op, implementation, implementation.load(), list(norms.calls), device)
    assert {each.site.kernel for each in opened} == {"rms_norm_triton_fwd_kernel", "rms_norm_triton_bwd_kernel"}
    assert job.mode != "eager"
    searched = [u for u in units if u.launches]
    assert [u.launches for u in searched] == [{o.site: v} for o in opened for v in (o.default, *o.alternatives)]
    assert all(u.in_compiled_step for u in searched)
    with absent_gpu(TARGETS[90]):
        eagerly = [u.launches for u in warm._units(job.tasks, "eager", device) if u.launches]
    assert eagerly == [{o.site: v} for o in opened for v in o.alternatives]
    assert {u.name for u in units if u.launches} == {"triton"}
    known = {"triton": Candidate(status="verified")}  # at another size
    later = job.tasks[0].model_copy(update={"verify": [], "verified": known})
    done = later.model_copy(update={"launched": ["triton"]})
    with absent_gpu(TARGETS[90]):
        again = list(warm._units([later], job.mode, device))
        assert not [u for u in warm._units([done], job.mode, device) if u.launches]
    assert [u.launches for u in again if u.launches] == [u.launches for u in units if u.launches]


@pytest.mark.skipif(INTERPRETED, reason="float32 alone is exact under TRITON_INTERPRET=1")
def test_what_takes_longest_is_begun_with_whichever_op_it_belongs_to() -> None:
    """A tile of heads of 128 in float32 takes as long to compile as all the rest on all cores."""
    ops = ("add_rms_norm", "attention", "rotary", "rotary_attention")
    first = {op: next(iter(get_op(op).cases(torch.bfloat16).values())) for op in ops}
    tasks = [Task.of(op, {call: 1}, ["triton"], measure=False) for op, call in first.items()]
    with absent_gpu(TARGETS[90]):
        units = sorted(warm._units(tasks, "eager", torch.device("cpu")), key=warm._Unit.order)
    long, rest = units[:2], [unit for unit in units[2:] if unit.awaited_by != CLOCK]
    assert {(unit.op.name, unit.call.compute_dtype) for unit in long} == {
        ("attention", torch.float32), ("rotary_attention", torch.float32)
    }  # fmt: skip
    assert all("x128 float32" in unit.call.describe() for unit in long)
    assert list(dict.fromkeys(unit.op.name for unit in rest)) == list(ops)


def test_two_processes_share_the_work(job: Job, tmp_path: Path) -> None:
    board = tmp_path / "board"
    job.write(tmp_path / "job.json")
    arguments = [str(tmp_path / "job.json"), str(board)]
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    with (
        started_process("llmmed.autotune.warm", arguments, logs[0]) as first,
        started_process("llmmed.autotune.warm", arguments, logs[1]) as second,
    ):
        assert [first.wait(120), second.wait(120)] == [0, 0]
    found = Board(board)
    assert len(found.finished()) == len(list(warm._units(job.tasks, job.mode, torch.device("cpu"))))
    assert not found.is_awaited()
    assert not found.claim("0")


def test_what_is_compiled_for_the_search_is_what_the_runs_step_launches() -> None:
    """Of cross_entropy, eager mode's forward pass writes the gradient, and that of a compiled step does not."""
    call = get_op("cross_entropy").cases(torch.bfloat16)["large vocabulary"]
    found = {}
    modes: tuple[Mode, ...] = ("eager", "graphs")
    with absent_gpu(TARGETS[90]):
        for mode in modes:
            units = list(warm._searched(get_op("cross_entropy"), "triton", [call], mode, torch.device("cpu")))
            assert units
            found[mode] = {dict(site.at)["gradient"] for unit in units for site in unit.launches}
    assert found == {"eager": {1}, "graphs": {0}}
