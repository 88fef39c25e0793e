"""A sweep's jobs run in processes of their own; one that fails does not take the others with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMOKE = ["experiment=smoke", "data=synthetic", "train.max_steps=4", "train.compile=eager"]


def sweep(arguments: list[str], folder: Path, repository: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(repository / "scripts" / "train.py"),
        "-m",
        *SMOKE,
        *arguments,
        "hydra.sweep.dir=sweep",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


def states(folder: Path) -> dict[str, str]:
    found = sorted((folder / "sweep").glob("*/status.json"))
    return {path.parent.name: json.loads(path.read_text())["state"] for path in found}


@pytest.mark.slow
def test_the_others_finish_and_the_message_says_which_failed_and_why(tmp_path: Path, repository: Path) -> None:
    done = sweep(["kernels=pytorch,triton", "seed=1"], tmp_path, repository)
    assert done.returncode == 1
    assert sorted(states(tmp_path).values()) == ["failed", "finished"]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "kernels=triton" in last
    assert "needs a CUDA GPU" in last or "attention" in last
    plans = list((tmp_path / "sweep").glob("*/kernels.json"))
    assert len(plans) == 1

    # The same command again runs only what is missing.
    before = plans[0].stat().st_mtime_ns
    again = sweep(["kernels=pytorch,triton", "seed=1"], tmp_path, repository)
    assert "finished before, skipped" in again.stdout
    assert plans[0].stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_killed_job_is_told_and_the_next_one_runs(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "scripts" / "train.py"), "-m", *SMOKE, "kernels=pytorch",
               "train.max_steps=100000,4", "hydra.sweep.dir=sweep"]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        running = [s for s in (tmp_path / "sweep").glob("*100000*/metrics.jsonl") if s.stat().st_size]
        if running:
            break
        time.sleep(0.2)
    status = json.loads((running[0].parent / "status.json").read_text())
    os.kill(status["pid"], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "killed by SIGKILL" in errors
    assert sorted(states(tmp_path).values()) == ["failed", "finished"]
