"""Checkpoints: complete or absent, and a damaged one is named and passed over."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from llmmed.training import checkpoint


def write(folder: Path, step: int) -> Path:
    model = {"weight": torch.full((3,), float(step))}
    return checkpoint.save(folder, step, model, {"exp_avg": torch.ones(2)}, {"note": step}, keep=5)


def test_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path, step)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
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
        found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.step == 10
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
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000010"]


def test_nothing_to_load(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "none") is None
