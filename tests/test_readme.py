"""The README's commands compose, and its worked example does what the README says, in a copy of the project."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmmed import compose

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TRAIN = re.compile(r"^    python scripts/train\.py (.+)$", re.MULTILINE)


def test_there_are_commands() -> None:
    assert len(TRAIN.findall(README)) >= 4


@pytest.mark.parametrize("command", TRAIN.findall(README))
def test_every_training_command_composes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_notes").mkdir()
    (tmp_path / "my_notes" / "heart.txt").write_text("The heart pumps blood. " * 1000)
    monkeypatch.chdir(tmp_path)
    overrides = [word for word in shlex.split(command.partition("#")[0]) if word != "-m"]
    swept = [override.split(",") for override in overrides]
    for choice in range(max(map(len, swept))):
        compose.compose([_pick(override, choice) for override in overrides])


def _pick(override: str, choice: int) -> str:
    key, _, values = override.partition("=")
    options = values.split(",")
    return f"{key}={options[min(choice, len(options) - 1)]}"


@pytest.mark.slow
def test_the_worked_example_is_verified_and_listed(tmp_path: Path, repository: Path) -> None:
    for name in ("llmmed", "configs", "scripts"):
        shutil.copytree(repository / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = re.search(r"say `(llmmed/kernels/\S+\.py)`", README)
    code = re.search(r"```python\n(.+?)```", README, re.DOTALL)
    assert path is not None
    assert code is not None
    (tmp_path / path[1]).write_text(code[1])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    verified = run("scripts/verify.py", "op=rms_norm", "impl=mine")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert re.search(r"rms_norm +mine +float32 +verified", verified.stdout)
    forced = run("scripts/train.py", "experiment=smoke", "data=synthetic", "kernels=pytorch",
                 "kernels.pin.rms_norm=mine", "train.max_steps=2")  # fmt: skip
    assert forced.returncode == 0, forced.stdout + forced.stderr
    assert re.search(r"✓ mine +verified", forced.stdout)

    # A wrong one is refused, however it is asked for.
    wrong = code[1].replace(".mean(-1, keepdim=True) + eps", ".mean(-1, keepdim=True)")
    assert wrong != code[1]
    (tmp_path / path[1]).write_text(wrong)
    assert run("scripts/verify.py", "op=rms_norm", "impl=mine").returncode == 1
    refused = run("scripts/train.py", "experiment=smoke", "data=synthetic", "kernels=pytorch",
                  "kernels.pin.rms_norm=mine", "train.max_steps=2")  # fmt: skip
    assert refused.returncode == 1
    assert "not used because it is wrong" in refused.stderr
