"""What goes wrong at three in the morning: one line, an exit code, and nothing lost that was on disk."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import Tagged
from tests.training.tiny import newest_checkpoint

SMOKE = ["experiment=smoke", "data=synthetic", "kernels=pytorch", "train.eval_every=0", "hydra.run.dir=disk/run"]


def can_mount() -> bool:
    """Whether a file system of limited size can be made here, in a namespace of its own."""
    try:
        return subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs user namespaces: unshare -Urm")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "disk").mkdir()
    train = shlex.join([sys.executable, str(repository / "scripts" / "train.py"), *SMOKE, "train.keep_last=1"])
    # Room for one checkpoint of 4.5 MB and not for two. What lies there goes with the namespace, so it is copied out.
    script = f"mount -t tmpfs -o size=8m tmpfs disk && {train}; code=$?; cp -r disk/run kept; exit $code"
    done = subprocess.run(
        ["unshare", "-Urm", "bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "No space left on device" in lines[0]
    assert "step 20" in lines[0]
    assert newest_checkpoint(tmp_path / "kept").step == 10
    assert not list((tmp_path / "kept" / "checkpoints").glob(".writing-*"))
    assert json.loads((tmp_path / "kept" / "status.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_without_wandb_the_run_finishes(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('broken on purpose')")
    command = [sys.executable, str(repository / "scripts" / "train.py"), *SMOKE, "logger=wandb", "train.max_steps=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=_with_path(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "W&B is not used: broken on purpose" in done.stderr
    assert json.loads((tmp_path / "disk" / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_wandb_that_dies_in_the_middle_does_not_end_the_run(tmp_path: Path, repository: Path) -> None:
    """A W&B that starts, then raises at every call, and one call that never returns."""
    (tmp_path / "wandb.py").write_text(
        "import time\n"
        "class Settings:\n"
        "    def __init__(self, **_): pass\n"
        "class Run:\n"
        "    id = 'x'\n"
        "    summary = {}\n"
        "    def log(self, *_, **__): raise ConnectionError('server gone')\n"
        "    def finish(self, **_): time.sleep(3600)\n"
        "class Table:\n"
        "    def __init__(self, **_): pass\n"
        "def init(**_): return Run()\n"
    )
    command = [sys.executable, str(repository / "scripts" / "train.py"), *SMOKE, "logger=wandb", "train.max_steps=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=_with_path(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("server gone") == 1
    assert json.loads((tmp_path / "disk" / "run" / "status.json").read_text())["state"] == "finished"
    assert (tmp_path / "disk" / "run" / "summary.json").exists()


@pytest.mark.slow
def test_a_wandb_server_that_never_answers_is_not_waited_for(tmp_path: Path, repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:  # connections succeed, nobody speaks
        environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "WANDB_API_KEY": "a" * 40}
        run = Tagged(
            [sys.executable, str(repository / "scripts" / "train.py"), *SMOKE, "logger=wandb", "logger.mode=online",
             "logger.timeout_seconds=2", "train.max_steps=2"], tmp_path, **environment,
        )  # fmt: skip
        assert run.process.wait(60) == 0, run.output.read_text()
        assert "W&B is not used: no answer within logger.timeout_seconds=2" in run.output.read_text()
        run.all_end()
    assert (tmp_path / "disk" / "run" / "summary.json").exists()


@pytest.mark.slow
def test_a_wandb_service_that_is_killed_does_not_end_the_run(tmp_path: Path, repository: Path) -> None:
    run = Tagged(
        [sys.executable, str(repository / "scripts" / "train.py"), *SMOKE, "logger=wandb", "logger.timeout_seconds=40",
         "train.max_steps=200", "train.log_every=1"], tmp_path,
    )  # fmt: skip
    run.wait_until((tmp_path / "disk" / "run" / "metrics.jsonl").exists)

    def services() -> list[int]:
        return [pid for pid, command in run.processes().items() if "wandb-core" in command]

    run.wait_until(lambda: bool(services()))  # a process that is just being replaced has no command for a moment
    for pid in services():
        os.kill(pid, signal.SIGKILL)
    assert run.process.wait(120) == 0, run.output.read_text()
    assert run.output.read_text().count("W&B failed") == 1
    assert "Traceback" not in run.output.read_text()
    run.all_end()
    steps = [json.loads(line)["step"] for line in (tmp_path / "disk" / "run" / "metrics.jsonl").open()]
    assert steps[-1] == 200
    assert json.loads((tmp_path / "disk" / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces: unshare -Urm")
def test_a_read_only_output_folder_is_one_line(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "disk").mkdir()
    train = shlex.join([sys.executable, str(repository / "scripts" / "train.py"), *SMOKE])
    done = subprocess.run(
        ["unshare", "-Urm", "bash", "-c", f"mount -t tmpfs -o ro tmpfs disk && {train}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == ["error: Read-only file system: disk/run"]


@pytest.mark.slow
def test_out_of_memory_is_one_line_with_what_to_try(tmp_path: Path, repository: Path) -> None:
    size = ["train.micro_batch_size=16384", "train.seq_len=256"]  # a GiB each activation
    train = shlex.join([sys.executable, str(repository / "scripts" / "train.py"), *SMOKE, *size, "device=cpu"])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -d 3000000; {train}"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: out of memory in training with train.micro_batch_size=16384; "
        "try train.micro_batch_size=8192 train.global_batch_tokens=4194304"
    )
    assert done.stderr.count("\n") == 1
    assert json.loads((tmp_path / "disk" / "run" / "status.json").read_text())["state"] == "failed"


def _with_path(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
