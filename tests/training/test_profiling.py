"""A trace of some steps, as Perfetto reads it, also of a run that is short or ends early."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from llmmed.signals import Interrupted
from tests.training.tiny import SignalsAt, run, tiny_config


def events(folder: Path) -> list[str]:
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_the_trace_has_as_many_steps_as_asked_for(tmp_path: Path) -> None:
    run(tiny_config("train.profile_steps=3"), tmp_path)
    assert sum(name.startswith("Optimizer.step#AdamW") for name in events(tmp_path)) == 3
    assert "steps 6 to 8 are traced in" in (tmp_path / "console.txt").read_text().replace("\n", " ")


@pytest.mark.parametrize("steps", [2, 20])
def test_a_short_run_is_traced_too(tmp_path: Path, steps: int) -> None:
    run(tiny_config("train.max_steps=3", f"train.profile_steps={steps}"), tmp_path)
    assert sum(name.startswith("Optimizer.step#AdamW") for name in events(tmp_path)) == min(steps, 3)


def test_a_run_that_ends_early_leaves_what_was_recorded(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tiny_config("train.profile_steps=6"), tmp_path, sinks=[SignalsAt(7)])
    assert sum(name.startswith("Optimizer.step#AdamW") for name in events(tmp_path)) == 2


def test_nothing_is_traced_unasked(tmp_path: Path) -> None:
    run(tiny_config("train.max_steps=2"), tmp_path)
    assert not (tmp_path / "trace.json.gz").exists()
