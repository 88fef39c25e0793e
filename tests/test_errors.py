"""A user's mistake is one line that helps, exit code 1, no traceback, no folder left behind, within three seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmmed.compose import compose
from llmmed.errors import UserError

# What is typed, and what the line must say.
MISTAKES = {
    "unknown option": (["model=huge"], ["model=huge", "tiny", "large"]),
    "unknown group": (["modle=small"], ["modle"]),
    "unknown key": (["train.max_step=3"], ["train.max_step", "did you mean train.max_steps?"]),
    "wrong type": (["train.max_steps=many"], ["train.max_steps", "valid integer"]),
    "fraction for an integer": (["train.max_steps=2.5"], ["train.max_steps", "integer"]),
    "out of range": (["train.max_steps=0"], ["train.max_steps=0", "greater than 0"]),
    "not one of the choices": (["train.precision=fp8"], ["train.precision", "'fp32', 'bf16' or 'fp16'"]),
    "heads and width": (["model.n_heads=7"], ["model.d_model=384", "model.n_heads=7", "try"]),
    "key-value heads": (["model.n_kv_heads=3"], ["model.n_kv_heads=3", "allowed: 1, 2, 4, 8"]),
    "added key": (["+new=3"], ["new", "no such key"]),
    "added key in a group": (["+train.new=3"], ["train.new", "no such key"]),
    "removed key": (["~train.max_steps"], ["train.max_steps is missing"]),
    "no override": (["train.max_steps"], ["train.max_steps", "key=value"]),
    "missing data file": (["data=text", "data.path=/no/such/file.txt"], ["/no/such/file.txt"]),
    "no data path": (["data=text"], ["data.path"]),
    "pin of an unknown op": (["kernels.pin.rms_nrom=triton"], ["rms_nrom", "rms_norm"]),
    "pin of an unknown implementation": (["kernels.pin.rms_norm=cuda"], ["cuda", "pytorch", "triton"]),
    "batch that does not divide": (["train.global_batch_tokens=1000"], ["train.global_batch_tokens=1000", "nearest"]),
    "vocabulary": (["model.vocab_size=100"], ["model.vocab_size=100", "tokenizer.vocab_size"]),
    "resume from nothing": (["train.resume=/no/such/run"], ["/no/such/run"]),
}

# One of each place that tells: Hydra, OmegaConf's grammar, the types, what only several keys tell, the run folder.
FROM_THE_COMMAND_LINE = ["unknown option", "no override", "wrong type", "pin of an unknown op", "resume from nothing"]


def train(arguments: list[str], folder: Path, repository: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    command = [sys.executable, str(repository / "scripts" / "train.py"), *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ)
    return done, time.perf_counter() - started


def assert_one_line(done: subprocess.CompletedProcess[str], expected: list[str]) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for words in expected:
        assert words in lines[0]


@pytest.mark.parametrize("name", sorted(set(MISTAKES) - set(FROM_THE_COMMAND_LINE)))
def test_a_mistake_is_told_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("Text that nobody asked for. " * 1000)
    arguments, expected = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        compose(arguments)
    assert "\n" not in str(caught.value)
    for words in expected:
        assert words in str(caught.value)


@pytest.mark.parametrize("name", FROM_THE_COMMAND_LINE)
def test_a_mistake_is_one_line(name: str, tmp_path: Path, repository: Path) -> None:
    arguments, expected = MISTAKES[name]
    done, seconds = train(arguments, tmp_path, repository)
    assert_one_line(done, expected)
    assert not (tmp_path / "outputs").exists()
    assert seconds < 10, "three seconds on an idle machine; tests may share theirs"


def test_empty_text(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "empty.txt").touch()
    done, _ = train(["data=text", "data.path=empty.txt"], tmp_path, repository)
    assert_one_line(done, ["empty.txt"])


def test_a_sequence_longer_than_the_data(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "short.txt").write_text("The heart is a muscle.\n\nThe femur is a bone.\n")
    done, _ = train(["data=text", "data.path=short.txt", "tokenizer.vocab_size=300"], tmp_path, repository)
    assert_one_line(done, ["train.seq_len"])


def test_a_sequence_longer_than_the_validation_part(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "notes.txt").write_text("\n\n".join(f"Bone number {i} lies beside bone {i * i}." for i in range(60)))
    done, seconds = train(["data=text", "data.path=notes.txt", "tokenizer.vocab_size=300"], tmp_path, repository)
    assert_one_line(done, ["train.seq_len=128", "the validation part of data=text has", "more text"])
    assert seconds < 20, "three seconds on an idle machine, and nothing was tuned"
    assert not list(tmp_path.glob("outputs/*/*/kernels.json"))


def test_outputs_that_cannot_be_written(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "outputs").write_text("a file where the folder should be")
    done, _ = train(["experiment=smoke"], tmp_path, repository)
    assert_one_line(done, ["outputs"])
