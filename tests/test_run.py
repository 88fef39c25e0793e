"""What a run does when."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmmed import data
from llmmed import run as run_module
from llmmed.errors import UserError
from llmmed.kernels.operator import INTERPRETED
from llmmed.run_folder import read_status
from llmmed.signals import INTERRUPTED
from tests.training.tiny import tiny_config


@pytest.mark.parametrize("policy", ["auto", "pytorch"])
def test_tunings_processes_are_begun_with_while_data_is_prepared(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They import for as long as a small tokenizer takes. Without anything to choose there are none to come."""
    happened: list[object] = []
    prepare = data.prepare

    @contextlib.contextmanager
    def processes_to_come(device: str) -> Iterator[str]:
        happened.append(f"begun on {device}")
        try:
            yield "how"
        finally:
            happened.append("ended")

    def prepared(*args: Any, **options: Any) -> data.Dataset:
        happened.append("data")
        return prepare(*args, **options)

    def tune(*args: Any, start: object, **options: Any) -> None:
        happened.append(start)
        raise UserError("enough")

    monkeypatch.setattr(run_module, "processes_to_come", processes_to_come)
    monkeypatch.setattr(data, "prepare", prepared)
    monkeypatch.setattr(run_module, "tune", tune)
    with contextlib.suppress(UserError):
        run_module.run(tiny_config(f"kernels={policy}"), tmp_path, started=0.0)
    assert happened == (["begun on cpu", "data", "how", "ended"] if policy == "auto" else ["data", None])


@pytest.mark.skipif(INTERPRETED, reason="there Triton kernels run on a CPU")
@pytest.mark.parametrize("asked", ["kernels=triton", "kernels.pin.rms_norm=triton"])
def test_what_cannot_be_used_here_is_told_before_data_is_prepared(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "prepare", lambda *args, **options: pytest.fail("data was prepared"))
    assert run_module.run(tiny_config(asked, "device=cpu"), tmp_path, started=0.0) == 1
    assert "cannot be used here" in capsys.readouterr().err


def test_a_run_that_a_library_ends_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*args: Any) -> None:
        raise SystemExit("enough")

    monkeypatch.setattr(run_module, "_run", leave)
    with pytest.raises(SystemExit):
        run_module.run(tiny_config(), tmp_path, started=0.0)
    status = read_status(tmp_path)
    assert (status.state, status.reason) == ("failed", "SystemExit: enough")


def test_a_resumed_run_that_is_stopped_before_a_step_tells_the_steps_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_module.run(tiny_config("kernels=pytorch", "train.max_steps=4"), tmp_path, started=0.0) == 0
    prepare = data.prepare

    def interrupted(*args: Any, **options: Any) -> data.Dataset:
        os.kill(os.getpid(), signal.SIGINT)
        return prepare(*args, **options)

    monkeypatch.setattr(data, "prepare", interrupted)
    config = tiny_config("kernels=pytorch", "train.resume=auto")
    assert run_module.run(config, tmp_path, started=0.0) == INTERRUPTED
    assert read_status(tmp_path).reason == "SIGINT after step 4, before another was done"


def test_kernels_that_nobody_will_find_are_told(
    tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant("right", "layer_norm.right")

    def enough(*args: Any, **options: Any) -> None:
        raise UserError("enough")

    monkeypatch.setattr(data, "prepare", enough)
    run_module.run(tiny_config("kernels=pytorch"), tmp_path, started=0.0)
    assert "planted-kernels registers 'layer_norm.right'" in caplog.text
