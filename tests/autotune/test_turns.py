"""Runs that want the same plan: one tunes, the others wait, and nobody waits for ever."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmmed.autotune import tuner, turns
from llmmed.autotune.tuner import tune
from llmmed.autotune.turns import turn
from llmmed.autotune.workload import Workload
from llmmed.config import Config


@pytest.fixture(autouse=True)
def _own_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMMED_CACHE", str(tmp_path))
    monkeypatch.setattr(turns, "_POLL_SECONDS", 0.01)


def test_the_second_waits_for_the_first(caplog: pytest.LogCaptureFixture) -> None:
    got: list[float] = []

    def wait() -> None:
        with turn("a", 60.0):
            got.append(time.monotonic())

    thread = threading.Thread(target=wait)
    with caplog.at_level(logging.INFO), turn("a", 60.0), turn("b", 60.0):  # which is another plan
        thread.start()
        while "waiting for its plan" not in caplog.text:
            time.sleep(0.01)
        assert not got
    thread.join(10)
    assert got


def test_nobody_waits_for_longer_than_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), turn("a", 60.0), turn("a", 0.05):
        assert "tuning beside it" in caplog.text


def test_a_turn_ends_with_its_process(caplog: pytest.LogCaptureFixture) -> None:
    command = "import os\nfrom llmmed.autotune.turns import turn\nwith turn('a', 1):\n    os._exit(7)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 7
    with caplog.at_level(logging.INFO), turn("a", 60.0):
        assert not caplog.records


def test_where_files_cannot_be_locked_everybody_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with turn("a", 60.0), turn("a", 60.0):
        pass


class Reached(Exception):
    pass


def test_a_run_tunes_in_its_turn(
    tiny: Config, norms: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tuned(*arguments: object, **options: object) -> None:
        (lock,) = (tmp_path / "plans").glob("*.lock")
        with caplog.at_level(logging.INFO), turn(lock.stem, 0.0):
            assert "tuning beside it" in caplog.text
        raise Reached

    monkeypatch.setattr(tuner, "tune_in_child", tuned)
    with pytest.raises(Reached):
        tune(replace(tiny, kernels=replace(tiny.kernels, cache="use")), norms, mode="eager")
    (lock,) = (tmp_path / "plans").glob("*.lock")
    caplog.clear()
    with turn(lock.stem, 0.0):
        assert not caplog.records
