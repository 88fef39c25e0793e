"""The learning rate: warm-up, decay to the floor, no step at zero."""

from __future__ import annotations

import itertools
import math

import pytest

from llmmed.compose import compose
from llmmed.optim import learning_rate


def rates(schedule: str, steps: int = 100) -> list[float]:
    config = compose(["optimizer.lr=1.0", "optimizer.warmup_steps=10", f"optimizer.schedule={schedule}"]).optimizer
    return [learning_rate(step, config, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_the_rate(schedule: str) -> None:
    assert rates(schedule)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_decay_ends_at_the_floor(schedule: str) -> None:
    found = rates(schedule)
    assert found[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


def test_wsd_is_stable_until_the_decay() -> None:
    found = rates("wsd")
    assert found[10:80] == [1.0] * 70
    assert found[80] == pytest.approx(1 - 0.9 / 20)
    assert found[89] == pytest.approx(1 - 0.9 / 2)


def test_wsd_that_is_all_decay_begins_after_the_warm_up() -> None:
    config = compose(["optimizer.lr=1.0", "optimizer.warmup_steps=10", "optimizer.schedule=wsd",
                      "optimizer.decay_ratio=1.0"]).optimizer  # fmt: skip
    assert learning_rate(10, config, 100) == pytest.approx(1 - 0.9 / 90)
    assert learning_rate(99, config, 100) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [11, 12, 30])
def test_the_last_step_is_the_floor_however_few_there_are(schedule: str, steps: int) -> None:
    assert rates(schedule, steps)[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_peak_is_one_step(schedule: str) -> None:
    found = rates(schedule)
    assert [step for step, rate in enumerate(found) if rate == max(found)] == [9]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_without_a_warm_up_the_first_step_is_the_peak(schedule: str, steps: int) -> None:
    settings = ["optimizer.lr=1.0", "optimizer.warmup_steps=0", "optimizer.min_lr_ratio=0"]
    ratio = ["optimizer.decay_ratio=1"] if schedule == "wsd" else []
    config = compose([*settings, *ratio, f"optimizer.schedule={schedule}"]).optimizer
    found = [learning_rate(step, config, steps) for step in range(steps)]
    assert found[0] == 1.0
    assert found[-1] == (0.0 if steps > 1 else 1.0)


def test_shapes() -> None:
    cosine, linear = rates("cosine"), rates("linear")
    middle = 10 + 29
    progress = 30 / 90
    assert cosine[middle] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    assert linear[middle] == pytest.approx(1 - 0.9 * progress)
    assert rates("constant")[-1] == 1.0
