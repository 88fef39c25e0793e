"""The settings of a process that runs steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmmed.training import execution

knobs = pytest.importorskip("triton.knobs")


def triton_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.cache, "dir", str(folder))  # which sets the variable, too
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)


def test_inductor_does_not_move_tritons_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so in the middle of a process, wherever the variable is not set: what others compiled is lost then."""
    folder = tmp_path / ".triton" / "cache"
    triton_takes(folder, monkeypatch)
    execution.keep_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(folder)
    assert folder.is_dir()


def test_the_users_folder_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    execution.keep_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)


@pytest.mark.parametrize("there_is_one", [False, True])
def test_where_triton_cannot_write_inductors_folder_is_as_good(
    there_is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    if there_is_one:
        (home / "cache").mkdir(parents=True)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        home.write_text("no folder")
    triton_takes(home / "cache", monkeypatch)
    execution.keep_triton_cache()
    assert "TRITON_CACHE_DIR" not in os.environ
