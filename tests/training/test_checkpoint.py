"""Checkpoints: complete or absent, and a damaged one is named and passed over."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from llmmed.training import checkpoint


def write(folder: Path, step: int, keep: int = 5, best: int | None = None) -> Path:
    model = {"weight": torch.full((3,), float(step))}
    return checkpoint.save(folder, step, model, {"exp_avg": torch.ones(2)}, {"note": step}, keep, best)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path, step)
    path = checkpoint.latest(tmp_path)
    assert path is not None
    found = checkpoint.load(path)
    assert (found.step, found.state["note"]) == (20, 20)
    assert found.model["weight"].tolist() == [20.0] * 3


def test_a_manifest_that_names_nothing_vouches_for_nothing(tmp_path: Path) -> None:
    (write(tmp_path, 10) / "manifest.json").write_text("{}")
    assert "does not name model.safetensors" in str(checkpoint.damage(tmp_path / "step_00000010"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 10)
    file = write(tmp_path, 20) / name
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if how == "truncated" else data[:-2] + b"??")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == tmp_path / "step_00000010"
    assert "step_00000020" in caplog.text


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 20)
    assert names(tmp_path) == ["step_00000010"]


@pytest.mark.parametrize("keep", [1, 2])
def test_later_ones_go_and_do_not_count_among_those_that_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (5, 10, 20, 30):
        write(tmp_path, step)
    (tmp_path / "step_00000030" / "model.safetensors").write_bytes(b"x")
    write(tmp_path, 21, keep, best=5)
    assert names(tmp_path) == ["step_00000005", *(["step_00000020"] if keep == 2 else []), "step_00000021"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000021"


@pytest.mark.parametrize("killed_at", [1, 2])  # before the old one is set aside; before the new one takes its place
def test_killed_while_one_is_written_again_it_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    write(tmp_path, 10)
    moves: list[object] = []

    def killed(source: Path, target: Path) -> None:
        if str(target).rpartition("/")[2].endswith("step_00000010"):
            moves.append(target)
        if len(moves) == killed_at:
            raise KeyboardInterrupt
        Path(source).rename(target)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 10)
    path = checkpoint.latest(tmp_path)
    assert path is not None
    assert checkpoint.load(path).step == 10
    write(tmp_path, 20, keep=2)
    assert names(tmp_path) == ["step_00000010", "step_00000020"]


def test_they_are_as_private_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write(tmp_path, 10)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_what_is_set_aside_is_never_written_over(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint.set_aside(folder) is None
    for number in (1, 2):
        write(folder, number)
        assert checkpoint.set_aside(folder) == tmp_path / f"checkpoints.before-{number}"
    assert names(tmp_path) == ["checkpoints.before-1", "checkpoints.before-2"]
    assert names(tmp_path / "checkpoints.before-1") == ["step_00000001"]


def test_nothing_to_load(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
