"""Tuning as a whole: real discovery, a real tuning process on the CPU, and candidates that misbehave.

The candidates come from a package that the tests install into a folder of their own; see `planted_kernels.py`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmmed.autotune import child, tuner
from llmmed.autotune.child import Findings, Progress
from llmmed.autotune.journal import Event, Job, JournalReader, StepDone, StepTask, Task
from llmmed.autotune.plan import Candidate, KernelPlan, StepEvidence, StepTimes, StepTrial
from llmmed.autotune.tuner import tune
from llmmed.autotune.workload import Workload, record_workload
from llmmed.config import Config
from llmmed.errors import UserError
from llmmed.processes import started_process

Plant = Callable[..., None]


@pytest.fixture(autouse=True)
def _own_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMMED_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a tuning process was started")

    monkeypatch.setattr(tuner, "tune_in_child", refuse)


def with_kernels(config: Config, **change: object) -> Config:
    return replace(config, kernels=replace(config.kernels, **change))


def candidates(plan: KernelPlan) -> dict[str, Candidate]:
    return plan.ops["rms_norm"].candidates


def verdicts(plan: KernelPlan) -> dict[str, tuple[str, str]]:
    return {name: (c.status, c.reason) for name, c in candidates(plan).items()}


@pytest.mark.slow
def test_every_kind_of_failure_has_its_reason_and_the_others_go_on(tiny: Config, norms: Workload, plant: Plant) -> None:
    planted = ("right", "slow", "wrong", "no_gradient", "mutates", "raises", "hungry", "unavailable", "breaks")
    killers = ("hangs", "dies", "leaves", "hangs_when_measured", "dies_when_measured", "raises_when_measured")
    plant(*planted, *killers, "gpu_only", "half_only", "forward_only")
    seen: list[Progress] = []
    plan = tune(with_kernels(tiny, candidate_seconds=8.0), norms, mode="eager", report=seen.append)
    found = verdicts(plan)

    def told(name: str) -> str:
        return ": ".join(found[name])

    assert plan.ops["rms_norm"].chosen in ("pytorch", "right")
    assert found["pytorch"][0] == found["right"][0] == found["slow"][0] == "verified"
    assert candidates(plan)["slow"].total_ms > 5 * 5  # type: ignore[operator]
    assert "slower than" in told("slow")
    assert all((c.total_ms is not None) == (c.status == "verified") for c in candidates(plan).values())
    assert told("compiled") == ("unavailable: unavailable: torch.compile needs a C++ compiler on a CPU; install g++")
    assert found["wrong"][0] == "wrong"
    assert candidates(plan)["wrong"].relative_error == pytest.approx(0.02, rel=0.05)
    assert found["no_gradient"][0] == "no_backward"
    assert found["mutates"][0] == "wrong"
    assert found["raises"][0] == "crashed"
    assert "no such tile" in told("raises")
    assert found["hungry"][0] == "out_of_memory"
    assert told("unavailable").endswith("unavailable: the licence of this kernel has run out")
    assert told("breaks") == (
        "crashed: raised while it was loaded: OSError: libkernel.so: cannot open shared object file"
    )
    assert told("hangs") == "timed_out: took longer than kernels.candidate_seconds=8 while it was verified"
    assert told("dies") == "crashed: the process was killed by SIGSEGV while it was verified"
    assert told("leaves") == "crashed: the process ended with exit code 1 while it was verified: enough of this"
    assert told("hangs_when_measured").endswith("kernels.candidate_seconds=8 while it was measured")
    assert told("dies_when_measured").endswith("killed by SIGSEGV while it was measured")
    assert told("raises_when_measured") == "crashed: ValueError: no such tile, while measured"
    assert told("gpu_only") == "unavailable: unavailable: needs a CUDA GPU"
    assert told("half_only") == "unavailable: unavailable: supports bfloat16, not float32"
    assert "has no backward pass" in told("forward_only")
    assert {("verify", "hangs"), ("measure", "pytorch")} <= {(p.stage, p.name) for p in seen}
    assert "verifying rms_norm hangs" in " ".join(map(str, seen))
    assert not plan.cached


@pytest.mark.slow
def test_the_step_has_the_last_word(tiny: Config, norms: Workload, plant: Plant) -> None:
    names = ("slow_in_the_step", "wrong_in_the_step", "dies_in_the_step")
    plant(*names)
    # Where memory counts, none is left out for being slow alone.
    twice = replace(tiny.train, global_batch_tokens=2 * tiny.train.global_batch_tokens)
    plan = tune(replace(with_kernels(tiny, objective="memory"), train=twice), norms, mode="eager")
    found = {name: candidates(plan)[name] for name in names}
    assert {c.status for c in found.values()} == {"verified"}
    assert all(c.timed for c in found.values())
    assert plan.choice == {"rms_norm": "pytorch"}
    assert "the step loses" in found["slow_in_the_step"].reason
    assert "in the step the gradient of " in found["wrong_in_the_step"].reason
    assert found["dies_in_the_step"].reason == "the process was killed by SIGSEGV while it was tried in the step"
    assert plan.step is not None
    assert {trial.name for trial in plan.step.trials} == set(names)
    assert plan.step.default.choice["rms_norm"] == "pytorch"
    assert plan.step.default.ms > 0
    assert plan.step.micro_batches == 2


def test_a_real_workload_is_tuned_once_and_then_read_from_the_cache(
    tiny: Config, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant()
    config = with_kernels(tiny, cache="use")
    workload = record_workload(config)
    first = tune(config, workload, mode="eager")
    assert set(first.ops) == set(workload.by_op())
    assert {op.candidates["pytorch"].status for op in first.ops.values()} == {"verified"}
    assert all(op.candidates["pytorch"].timed for op in first.ops.values())
    assert not first.cached
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "tune_in_child", lambda *args, **kwargs: pytest.fail("a tuning process was started"))
        second = tune(config, workload, mode="eager")
    assert second.cached
    assert (second.ops, second.choice) == (first.ops, first.choice)


def test_what_the_step_refused_stays_refused_in_the_cache(
    tiny: Config, norms: Workload, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("right", "slow")

    def timed(ms: float) -> Candidate:
        return Candidate(status="verified", total_ms=ms, total_ms_low=ms, total_ms_high=ms)

    ops = {"rms_norm": {"pytorch": timed(3), "compiled": timed(4), "right": timed(1), "slow": timed(2)}}
    refused = StepTrial(op="rms_norm", name="right", against="pytorch", status="failed", reason="another gradient")

    def found(*args: object, findings: Findings, **rest: object) -> None:
        findings.ops, findings.trials = ops, [refused]
        findings.step_reason, findings.default_runs = "it does not run", False

    monkeypatch.setattr(tuner, "tune_in_child", found)
    plans = [tune(with_kernels(tiny, cache="use"), norms, mode="eager") for _ in range(2)]
    assert [plan.cached for plan in plans] == [False, True]
    assert [plan.choice["rms_norm"] for plan in plans] == ["slow", "slow"]
    assert [verdicts(plan)["right"][1] for plan in plans] == ["another gradient"] * 2


def test_tuning_that_was_cut_off_goes_on_where_it_was(
    tiny: Config, norms: Workload, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("right")
    config = with_kernels(tiny, cache="use")
    began_with: list[set[str]] = []

    def one_more(tasks: list[Task], *, findings: Findings, **rest: object) -> None:
        (task,) = tasks
        known = findings.ops.setdefault("rms_norm", {})
        began_with.append(set(known))
        name = next(name for name in task.verify if name not in known)
        known[name] = Candidate(status="verified", total_ms=1.0, total_ms_low=1.0, total_ms_high=1.0)
        if len(known) == 1:
            raise KeyboardInterrupt
        findings.cut_short = "" if len(known) == len(task.verify) else "kernels.budget_seconds was used up"

    monkeypatch.setattr(tuner, "tune_in_child", one_more)
    with pytest.raises(KeyboardInterrupt):
        tune(config, norms, mode="eager")
    plans = [tune(config, norms, mode="eager") for _ in range(3)]
    assert began_with == [set(), {"pytorch"}, {"pytorch", "compiled"}]
    assert [plan.cached for plan in plans] == [False, False, True]


def test_a_mode_that_the_default_does_not_run_in_is_told(
    tiny: Config, norms: Workload, plant: Plant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant()
    times = StepTimes(choice={"rms_norm": "pytorch"}, ms=1.0, ms_low=1.0, ms_high=1.0, peak_memory_gib=None)
    evidence = StepEvidence(
        trial_depth=1, depths=(1, 1), trials=[], default=times, chosen=times, reason="", mode="eager"
    )

    def found(*args: object, findings: Findings, **rest: object) -> None:
        findings.ops["rms_norm"] = {"pytorch": Candidate(status="verified")}
        findings.add(StepDone(evidence=evidence, reason="graphs: no"))

    monkeypatch.setattr(tuner, "tune_in_child", found)
    assert tune(tiny, norms, mode="eager").mode == "eager"
    assert [record.getMessage() for record in caplog.records] == ["the step is tried in eager mode: graphs: no"]


def test_the_name_of_a_model_changes_no_evidence(tiny: Config) -> None:
    step = StepTask(config={}, pinned={}, known={})
    facts = tuner._depends_on(tiny, step)
    for change in ({"name": "mine"}, {"init_from": "a-model"}):
        assert tuner._depends_on(replace(tiny, model=replace(tiny.model, **change)), step) == facts
    assert tuner._depends_on(replace(tiny, model=replace(tiny.model, n_layers=9)), step) != facts


@pytest.mark.slow
def test_launches_are_searched_recorded_and_taken_from_a_plan(
    tiny: Config, norms: Workload, plant: Plant, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plant("tuned", "tuned_to_death", "tuned_where_it_runs")
    config = with_kernels(tiny, cache="use")
    started: list[str] = []
    start = child.started_process
    monkeypatch.setattr(child, "started_process", lambda module, *rest: started.append(module) or start(module, *rest))
    plan = tune(config, norms, mode="eager")
    assert len(started) == 2  # of what cannot be searched, no process dies
    tuned, dead = candidates(plan)["tuned"], candidates(plan)["tuned_to_death"]
    (launch,) = tuned.launches
    assert launch.chosen == {"milliseconds": 5, "right": 1, "alive": 1}
    assert [trial.values["milliseconds"] for trial in launch.tried] == [40, 5, 60, 0]
    assert launch.tried[-1].reason.startswith("wrong: ")
    assert 5 * 5 < (tuned.total_ms or 0.0) < 5 * 40  # it is timed, and tried in the step, as it is launched
    assert (dead.status, dead.launches) == ("verified", [])  # a launch that kills the process costs no more than itself
    assert (dead.total_ms or 0.0) > 5 * 40
    unsearched = candidates(plan)["tuned_where_it_runs"]
    assert (unsearched.status, unsearched.launches) == ("verified", [])
    assert plan.launches["rms_norm"] == {"tuned": tuned.launch_values}

    plan = plan.model_copy(update={"ops": {"rms_norm": plan.ops["rms_norm"].model_copy(update={"chosen": "tuned"})}})
    plan.write(tmp_path / "kernels.json")
    given = tune(with_kernels(config, plan=str(tmp_path / "kernels.json")), norms, mode="eager")
    assert given.choice == {"rms_norm": "tuned"}
    assert candidates(given)["tuned"].launches == tuned.launches
    assert not caplog.records

    text = (tmp_path / "kernels.json").read_text()
    (tmp_path / "wrong.json").write_text(
        re.sub(r'("chosen": {\s*"milliseconds": )5(,\s*"right": )1', r"\g<1>0\g<2>0", text)
    )
    with caplog.at_level(logging.WARNING):
        refused = tune(with_kernels(config, plan=str(tmp_path / "wrong.json")), norms, mode="eager")
    assert candidates(refused)["tuned"].launches[0].chosen["milliseconds"] == 40
    assert "the plan's launch of planted is not used: here it is wrong: " in caplog.text


def test_two_tuning_runs_at_once_leave_a_whole_cache(tiny: Config, norms: Workload, plant: Plant) -> None:
    plant("slow")  # of which no step is timed
    config = with_kernels(tiny, cache="refresh")
    plans: list[KernelPlan] = []
    threads = [threading.Thread(target=lambda: plans.append(tune(config, norms, mode="eager"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [plan.cached for plan in plans] == [False, False]
    cached = tune(with_kernels(config, cache="use"), norms, mode="eager")
    assert cached.cached
    assert candidates(cached) in [candidates(plan) for plan in plans]


def test_the_budget_ends_tuning_with_what_is_known(tiny: Config, norms: Workload, plant: Plant) -> None:
    plant("hangs", "right")
    config = with_kernels(tiny, budget_seconds=6.0, candidate_seconds=60.0, cache="use")
    started = time.perf_counter()
    plan = tune(config, norms, mode="eager")
    assert time.perf_counter() - started < 10
    assert plan.choice == {"rms_norm": "pytorch"}
    assert verdicts(plan)["hangs"] == ("not_tried", "not tried: kernels.budget_seconds=6 was used up")
    assert "kernels.budget_seconds=6 was used up" in verdicts(plan)["pytorch"][1]
    for entry in (Path(os.environ["LLMMED_CACHE"]) / "plans").glob("*.json"):  # none if it came to nothing
        evidence = json.loads(entry.read_text())["evidence"]
        assert not evidence["finished"]  # and the next run goes on from what was tried to the end
        assert {"hangs", "right"}.isdisjoint(evidence["ops"]["rms_norm"])


def test_a_tuning_process_that_cannot_start_is_one_warning(
    tiny: Config, norms: Workload, plant: Plant, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant("right")
    (tmp_path / "site" / "pydantic.py").write_text("raise RuntimeError('a broken installation')\n")
    with caplog.at_level(logging.WARNING):
        plan = tune(tiny, norms, mode="eager")
    assert plan.choice == {"rms_norm": "pytorch"}
    assert verdicts(plan)["right"][0] == verdicts(plan)["pytorch"][0] == "not_tried"
    assert len(caplog.records) == 1
    assert "RuntimeError: a broken installation" in caplog.text


def test_pytorch_is_instant(tiny: Config, no_child: None) -> None:
    workload = record_workload(tiny)
    started = time.perf_counter()
    plan = tune(with_kernels(tiny, policy="pytorch"), workload, mode="eager")
    assert time.perf_counter() - started < 1
    assert set(plan.choice.values()) == {"pytorch"}
    assert plan.ops["rms_norm"].reason == "asked for by kernels=pytorch"


def test_triton_without_a_gpu_is_an_error_or_pytorch(
    tiny: Config, norms: Workload, no_child: None, caplog: pytest.LogCaptureFixture
) -> None:
    forced = with_kernels(tiny, policy="triton")
    with pytest.raises(UserError, match=r"kernels=triton: .*'rms_norm'.*needs a CUDA GPU.*on_unavailable=fallback"):
        tune(forced, norms, mode="eager")
    plan = tune(with_kernels(forced, on_unavailable="fallback"), norms, mode="eager")
    assert plan.choice == {"rms_norm": "pytorch"}
    assert "needs a CUDA GPU" in caplog.text


def test_a_pin_is_verified_and_not_timed(tiny: Config, norms: Workload, plant: Plant) -> None:
    plant("slow", "wrong", "dies")
    plan = tune(with_kernels(tiny, pin={"rms_norm": "slow", "rotary": None}), norms, mode="eager")
    assert plan.choice == {"rms_norm": "slow"}
    assert verdicts(plan) == {"slow": ("verified", "asked for by kernels.pin.rms_norm=slow")}
    assert not candidates(plan)["slow"].timed
    assert candidates(plan)["slow"].relative_error is not None
    with pytest.raises(UserError, match=r"kernels.pin.rms_norm=wrong.*because it is wrong"):
        tune(with_kernels(tiny, pin={"rms_norm": "wrong"}, on_unavailable="fallback"), norms, mode="eager")
    with pytest.raises(UserError, match=r"kernels.pin.rms_norm=dies.*killed by SIGSEGV"):
        tune(with_kernels(tiny, pin={"rms_norm": "dies"}), norms, mode="eager")


def test_descriptions_alone_rule_out(tiny: Config, norms: Workload, plant: Plant, no_child: None) -> None:
    plant("noisy", "eager_only")

    def pinned(name: str) -> Config:
        return with_kernels(tiny, pin={"rms_norm": name})

    noisy = pinned("noisy")
    with pytest.raises(UserError, match=r"train.deterministic=true"):
        tune(replace(noisy, train=replace(noisy.train, deterministic=True)), norms, mode="eager")
    with pytest.raises(UserError, match=r"cannot be part of a compiled step"):
        tune(pinned("eager_only"), norms, mode="compiled")
    with pytest.raises(UserError, match=r"in a compiled step pytorch is compiled too"):
        tune(pinned("compiled"), norms, mode="compiled")
    with pytest.raises(
        UserError, match=r"kernels.pin.rms_norm=nonsense: .*no implementation 'nonsense'; it has pytorch"
    ):
        tune(pinned("nonsense"), norms, mode="eager")


def test_a_plan_is_followed_after_verification(tiny: Config, norms: Workload, plant: Plant, tmp_path: Path) -> None:
    plant("slow")
    path = tmp_path / "kernels.json"
    tune(with_kernels(tiny, policy="pytorch"), norms, mode="eager").write(path)
    content = path.read_text()
    config = with_kernels(tiny, plan=str(path))
    path.write_text(content.replace('"chosen": "pytorch"', '"chosen": "slow"'))
    plan = tune(config, norms, mode="eager")
    assert plan.choice == {"rms_norm": "slow"}
    assert verdicts(plan) == {"slow": ("verified", f"asked for by kernels.plan={path}")}
    assert candidates(plan)["slow"].relative_error is not None

    path.write_text(content.replace('"chosen": "pytorch"', '"chosen": "triton"'))
    with pytest.raises(UserError, match=r"kernels.plan=.*needs a CUDA GPU"):
        tune(config, norms, mode="eager")
    path.write_text(content.replace('"chosen": "pytorch"', '"chosen": "gone"'))
    with pytest.raises(UserError, match=r"op 'rms_norm' has no implementation 'gone'"):
        tune(config, norms, mode="eager")
    path.write_text(content.replace('"rms_norm": {', '"layer_norm": {', 1))
    with pytest.raises(UserError, match=r"there is no op 'layer_norm'"):
        tune(config, norms, mode="eager")


def test_interrupting_ends_the_tuning_process(
    tiny: Config, norms: Workload, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("hangs")
    processes: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            processes.append(self)

    def interrupt(progress: Progress) -> None:
        if progress.name == "hangs":
            assert processes[0].poll() is None
            raise KeyboardInterrupt

    monkeypatch.setattr(child.subprocess, "Popen", Recorded)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny, norms, mode="eager", report=interrupt)
    assert [process.returncode for process in processes] == [-signal.SIGKILL]


def test_the_tuning_process_does_not_outlive_its_parent(
    make_job: Callable[..., Job], norms: Workload, plant: Plant, tmp_path: Path
) -> None:
    plant("hangs")
    job = make_job(tasks=[Task.of("rms_norm", norms.by_op()["rms_norm"], ["hangs"], measure=True)])
    job.write(tmp_path / "job.json")
    with started_process("llmmed.autotune.worker", [str(tmp_path / "job.json")], tmp_path / "log") as process:
        reader, events = JournalReader(job.journal), list[Event]()
        while not events:
            assert process.poll() is None, (tmp_path / "log").read_text()
            events += reader.read()
            time.sleep(0.05)
        assert process.stdin is not None
        process.stdin.close()  # as the end of the parent would, however it ends
        assert process.wait(timeout=10) == -signal.SIGKILL
