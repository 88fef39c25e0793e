"""The settings of a process that runs steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmmed.training import execution

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "what the tests run with")
    monkeypatch.delenv("TRITON_CACHE_DIR")


def test_inductor_does_not_move_tritons_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so in the middle of a process, wherever the variable is not set: what others compiled is lost then."""
    folder = tmp_path / ".triton" / "cache"
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    execution.keep_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(folder)
    assert folder.is_dir()


def test_the_users_folder_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    execution.keep_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)


def test_where_triton_cannot_write_inductors_folder_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))
    execution.keep_triton_cache()
    assert "TRITON_CACHE_DIR" not in os.environ
