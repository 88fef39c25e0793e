"""A sweep's jobs run in processes of their own, under every launcher; one that fails does not take the others along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llmmed import gpus, run_folder, sweep
from llmmed.errors import UserError
from llmmed.signals import INTERRUPTED
from tests.reporting.test_wandb_sink import whole_file

SMOKE = ["experiment=smoke", "data=synthetic", "train.max_steps=4", "train.compile=eager", "kernels=pytorch",
         "train.seq_len=16", "train.eval_every=0", "train.checkpoint_every=0"]  # fmt: skip


def start(arguments: list[str], folder: Path, repository: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(repository / "scripts" / "train.py"), "-m", *SMOKE, *arguments,
               "hydra.sweep.dir=sweep"]  # fmt: skip
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(arguments: list[str], folder: Path, repository: Path) -> tuple[int, str, str]:
    process = start(arguments, folder, repository)
    output, errors = process.communicate(timeout=280)
    return process.returncode, output, errors


def statuses(folder: Path) -> dict[str, str]:
    jobs = json.loads((folder / "sweep" / "sweep_summary.json").read_text())
    return {job["job"]: job["status"] for job in jobs}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}


@pytest.mark.slow
def test_the_others_finish_and_the_message_says_which_failed_and_why(tmp_path: Path, repository: Path) -> None:
    code, _, errors = run(["kernels=pytorch,triton", "seed=1"], tmp_path, repository)
    assert code == 1
    assert statuses(tmp_path) == {"kernels=pytorch": "finished", "kernels=triton": "failed"}
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "kernels=triton" in last
    assert "needs a CUDA GPU" in last or "attention" in last
    assert len(list((tmp_path / "sweep").glob("*/kernels.json"))) == 1


@pytest.mark.slow
def test_a_killed_job_is_told_and_the_same_command_runs_it_alone(tmp_path: Path, repository: Path) -> None:
    three = ["train.max_steps=4,200,5"]
    process = start(three, tmp_path, repository)
    deadline = time.monotonic() + 120
    while not (running := [p for p in (tmp_path / "sweep").glob("*=200*/metrics.jsonl") if p.stat().st_size]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed = running[0].parent
    os.kill(json.loads((killed / "status.json").read_text())["pid"], signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1] == "error: train.max_steps=200 failed: killed by SIGKILL"
    assert "sweep: 2 of 3 jobs finished" in output
    assert statuses(tmp_path) == {
        "train.max_steps=4": "finished", "train.max_steps=200": "failed", "train.max_steps=5": "finished",
    }  # fmt: skip

    others = [path for path in (tmp_path / "sweep").iterdir() if path.is_dir() and path != killed]
    before = [times(folder) for folder in others]
    code, output, errors = run(three, tmp_path, repository)
    assert (code, errors) == (0, "")
    assert output.count("finished before, skipped") == 2
    assert "sweep: 3 of 3 jobs finished" in output
    assert set(statuses(tmp_path).values()) == {"finished"}
    assert [times(folder) for folder in others] == before
    assert json.loads((killed / "summary.json").read_text())["steps"] == 200


@pytest.mark.slow
def test_joblib_jobs_are_compared_and_are_wandb_runs_of_one_group(tmp_path: Path, repository: Path) -> None:
    arguments = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "logger=wandb", "model.n_heads=4,3,2"]
    code, output, errors = run(arguments, tmp_path, repository)
    assert code == 1
    assert "sweep: 2 of 3 jobs finished" in output
    refusal = "model.d_model=64 does not divide"
    assert errors.strip().splitlines()[-1].startswith(f"error: model.n_heads=3 failed: {refusal}")
    assert output.startswith(f"job 1: model.n_heads=3: will be refused: {refusal}")  # before any job runs
    assert output.count("will be refused") == 1
    files = list((tmp_path / "sweep").glob("*/wandb/offline-run*/*.wandb"))
    runs = [r.run for file in files for r in whole_file(file) if r.WhichOneof("record_type") == "run"]
    assert {r.run_group for r in runs} == {"sweep"}
    assert len({r.run_id for r in runs}) == 2
    # Several jobs at a time do not print into each other.
    assert "tok/s" not in output
    assert all("tok/s" in (file.parents[2] / sweep.OUTPUT).read_text() for file in files)


@pytest.mark.slow
def test_optuna_minimizes_the_validation_loss_with_jobs_of_submitit(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    search = ["hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "model.d_model=choice(32,64)",
              "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2", "hydra/launcher=submitit_local"]  # fmt: skip
    code, output, errors = run(search, tmp_path, repository)
    assert code == 0, errors
    assert "sweep: 2 of 2 jobs finished" in output
    losses = {
        path.parent.name: json.loads(path.read_text())["final/val_loss"]
        for path in (tmp_path / "sweep").glob("*/summary.json")
    }
    best = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert f"best_value: {min(losses.values())}" in best
    assert len({name.partition("optimizer.lr=")[2] for name in losses}) == 2


def test_a_mistake_in_a_job_is_told_where_it_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("optimizer.lr=-1: must be above 0")

    monkeypatch.setattr(sweep.compose, "validate", refuse)
    job = OmegaConf.create({"job": {"num": 1, "override_dirname": "optimizer.lr=-1"},
                            "overrides": {"task": ["optimizer.lr=-1"]}})  # fmt: skip
    assert sweep.run_job(OmegaConf.create(), tmp_path, job) is None  # type: ignore[arg-type]
    assert "job 1: optimizer.lr=-1: failed: optimizer.lr=-1: must be above 0" in capsys.readouterr().out
    assert run_folder.read_status(tmp_path).state == "failed"


def test_a_job_that_failed_by_itself_gives_its_own_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder.write_status(tmp_path, "failed", reason="kernels=triton needs a CUDA GPU")
    assert sweep._outcome(1, tmp_path, "job 1") is None
    assert capsys.readouterr().out == "job 1: failed: kernels=triton needs a CUDA GPU\n"
    assert run_folder.read_status(tmp_path).reason == "kernels=triton needs a CUDA GPU"


def test_a_job_that_somebody_stops_ends_alone(tmp_path: Path) -> None:
    code, stopped = sweep._run([sys.executable, "-c", "raise SystemExit(130)"], os.environ, tmp_path / "output.txt")
    assert (code, stopped) == (INTERRUPTED, False)
    run_folder.write_status(tmp_path, "interrupted", reason="SIGTERM after step 3")
    assert sweep._outcome(code, tmp_path, "job 0") is None
    assert run_folder.read_status(tmp_path).reason == "SIGTERM after step 3"


def test_ctrl_c_waits_for_the_job(tmp_path: Path) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    code, stopped = sweep._run([sys.executable, "-c", "import time; time.sleep(1); print('whole')"], os.environ,
                               tmp_path / "output.txt")  # fmt: skip
    assert (code, stopped) == (0, True)
    assert (tmp_path / "output.txt").read_text() == "whole\n"


def test_a_plugin_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_installed", lambda module: False)
    with pytest.raises(UserError, match=r"pip install 'llmmed\[slurm\]'"):
        sweep.plugin_overrides(["seed=1,2", "hydra/launcher=submitit_slurm"])


def test_the_command_line_comes_before_our_values_for_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_installed", lambda module: True)
    ours = sweep.plugin_overrides(["hydra/launcher=joblib"])
    assert "hydra.launcher.n_jobs=${gpu_count:}" in ours
    given = sweep.plugin_overrides(["hydra/launcher=joblib", "hydra.launcher.n_jobs=4"])
    assert not [override for override in given if "n_jobs=$" in override]
    assert sweep.plugin_overrides(["seed=1,2"]) == []


def test_each_job_gets_a_gpu_that_no_other_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert gpus.visible_gpus() == ["2", "5"]
    got: list[str] = []

    def third() -> None:
        with gpus.own_gpu() as environment:
            got.append(environment["CUDA_VISIBLE_DEVICES"])

    with gpus.own_gpu() as first:
        with gpus.own_gpu() as second:
            assert (first, second) == ({"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"})
            waiting = threading.Thread(target=third)
            waiting.start()
            waiting.join(0.1)
            assert got == []
        waiting.join(10)
        assert got == ["5"]


@pytest.mark.parametrize("visible", ["", "-1", "0"])
def test_one_gpu_or_none_is_not_shared_out(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with gpus.own_gpu() as environment:
        assert environment == {}
