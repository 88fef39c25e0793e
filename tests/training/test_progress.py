"""What a log file shows of a run's progress."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmmed.training import progress
from llmmed.training.progress import TrainingProgress


@pytest.mark.parametrize(("first", "last", "every"), [(0, 200, 10), (40, 200, 10), (0, 30, 1)])
def test_the_time_left_forgets_what_only_the_first_steps_take(
    first: int, last: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock)
    file = io.StringIO()
    with TrainingProgress(Console(file=file, width=120), first, last) as shown:
        for step in range(first + 1, last + 1):
            clock += {first + 1: 100, first + 3: 20}.get(step, 2)  # compiled; traced
            shown.advance(step)
            if step % every == 0:
                shown.show(step, {"loss": 1.5, "tokens_per_second": 1e6})
    told = {int(line.split()[1].split("/")[0]): line.rpartition("tok/s")[2] for line in file.getvalue().splitlines()}
    assert list(told) == list(range(first + every, last + 1, every))
    for step, text in told.items():
        minutes, seconds = divmod(2 * (last - step), 60)
        assert text == ("" if step <= first + 3 else f"  {minutes}:{seconds:02d} left")


def test_a_run_of_a_step_says_nothing_of_the_time_left() -> None:
    file = io.StringIO()
    with TrainingProgress(Console(file=file, width=120), 0, 1) as shown:
        shown.advance(1)
        shown.show(1, {"loss": 1.5})
    assert file.getvalue() == "step 1/1  loss 1.500\n"
