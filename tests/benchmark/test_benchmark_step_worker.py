"""What the process of a contestant leaves, whatever the contestant does."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llmmed.benchmark import step, step_worker
from llmmed.benchmark.contestants import CONTESTANTS
from llmmed.benchmark.settings import compose_benchmark
from llmmed.benchmark.step_worker import StepFound, StepJob
from tests.benchmark.samples import STEP, TINY


class Pretender:
    """Adds 1 to some of its weights in every step; its losses and gradient norms are given, the last ones for good."""

    excluded_seconds = 0.0
    plan = None

    def __init__(self, losses: Sequence[float] = (5.0,), norms: Sequence[float] = (1.0,)) -> None:
        self.losses, self.norms, self.indices = list(losses), list(norms), list[int]()
        self.parameters = [torch.zeros(3, 4), torch.full((4,), 7.0)]

    def step(self, index: int, micro_batches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        made = len(self.indices)
        self.indices.append(index)
        self.parameters[1] += 1
        return tuple(torch.tensor(values[min(made, len(values) - 1)]) for values in (self.losses, self.norms))

    def annotated(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def competed(pretender: Pretender, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> StepFound:
    """What the process of a contestant leaves on disk."""
    monkeypatch.setattr(step_worker, "build", lambda contestant, config: pretender)
    monkeypatch.setattr(step_worker, "end_with_parent", lambda: None)
    monkeypatch.setattr(step_worker.os, "_exit", lambda code: None)
    job = StepJob(contestant="plain_eager", overrides=[*TINY, *STEP, *more], started=time.time(),
                  result=folder / "result.json", plan=folder / "plan.json")  # fmt: skip
    job.write(folder / "job.json")
    monkeypatch.setattr(sys, "argv", ["step_worker", str(folder / "job.json")])
    step_worker.main()
    return StepFound.read(folder / "result.json")


@pytest.mark.parametrize(
    ("losses", "norms", "reason"),
    [
        ([float("nan")], [1.0], "first loss is nan, last loss is nan"),
        ([5.0], [float("inf")], "first gradient norm is inf"),
        ([5.0, 5.0, float("nan")], [1.0], "last loss is nan"),
    ],
)
def test_a_loss_that_is_not_finite_is_wrong(
    losses: list[float], norms: list[float], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = competed(Pretender(losses, norms), tmp_path, monkeypatch)
    assert (found.status, found.reason, found.samples) == ("wrong", reason, [])
    odd = StepFound(status="verified", first_loss=float("nan"))
    assert math.isnan(StepFound.model_validate_json(odd.model_dump_json()).first_loss or 0.0)


def test_times_outlive_a_profiler_that_fails_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk: list[StepFound] = []

    def broken(*_: object) -> dict[str, float]:
        on_disk.append(StepFound.read(tmp_path / "result.json"))
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(step_worker, "measure_breakdown", broken)
    found = competed(Pretender(), tmp_path, monkeypatch)
    assert found.reason == "not profiled: RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    assert on_disk[0].reason == "not profiled: the profiler did not end"  # what is left if the process is stopped now
    for each in (found, on_disk[0]):
        assert (each.status, len(each.samples), each.first_loss) == ("verified", 3, 5.0)
    entry = step._Entry(CONTESTANTS[0], None, compose_benchmark([*TINY, *STEP])[1], [found])
    assert entry.row().reason == found.reason
    assert entry.row().tokens_per_second is not None


def test_of_several_rounds_each_counts_once() -> None:
    found = [StepFound(status="verified", samples=samples, peak_memory_gib=1.0)
             for samples in ([10.0] * 20, [20.0, 21.0, 22.0], [30.0])]  # fmt: skip
    row = step._Entry(CONTESTANTS[0], None, compose_benchmark([*TINY, *STEP])[1], found).row()
    assert (row.tokens_per_second, row.tokens_per_second_low, row.tokens_per_second_high) == (21.0, 10.0, 30.0)


def test_all_contestants_warm_up_for_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))  # reading it takes a second
    monkeypatch.setattr(step_worker.time, "perf_counter", lambda: float(next(clock)))
    pretender = Pretender()
    competed(pretender, tmp_path, monkeypatch, "warm_up_seconds=9", "profile_steps=0")
    first, warm, timed = 1, 1, 3
    assert len(pretender.indices) == first + warm + 8 + timed


def test_the_size_of_the_updates_is_that_of_the_steps_that_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = competed(Pretender(), tmp_path, monkeypatch, "warm_up_steps=5", "warm_up_seconds=0", "profile_steps=0")
    assert found.update_rms == pytest.approx(6 * (4 / 16) ** 0.5)


def test_in_fp16_the_first_step_is_made_again_while_its_scale_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretender = Pretender(norms=[float("inf"), float("inf"), 1.0])
    found = competed(pretender, tmp_path, monkeypatch, "train.precision=fp16")
    assert (found.status, found.first_gradient_norm) == ("verified", 1.0)
    assert pretender.indices[:4] == [0, 0, 0, 1]
