"""What a log file shows of a run's progress."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmmed.training import progress
from llmmed.training.progress import TrainingProgress


@pytest.mark.parametrize("first", [0, 40])
def test_the_time_left_forgets_what_only_the_first_steps_take(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock)
    file, last = io.StringIO(), 200
    with TrainingProgress(Console(file=file, width=120), first, last) as shown:
        for step in range(first + 1, last + 1):
            clock += {first + 1: 100, first + 3: 20}.get(step, 2)  # compiled; traced
            shown.advance(step)
            if step % 10 == 0:
                shown.show(step, {"loss": 1.5, "tokens_per_second": 1e6})
    lines = file.getvalue().splitlines()
    left = {int(line.split()[1].split("/")[0]): line.rpartition("tok/s  ")[2] for line in lines}
    assert list(left) == list(range(first + 10, last + 1, 10))
    for step, text in list(left.items())[1:]:
        minutes, seconds = divmod(2 * (last - step), 60)
        assert text == f"{minutes}:{seconds:02d} left"
    assert lines[-1].endswith("0:00 left")


def test_a_run_of_a_step_says_nothing_of_the_time_left() -> None:
    file = io.StringIO()
    with TrainingProgress(Console(file=file, width=120), 0, 1) as shown:
        shown.advance(1)
        shown.show(1, {"loss": 1.5, "tokens_per_second": 0.0})
    assert file.getvalue() == "step 1/1  loss 1.500\n"
