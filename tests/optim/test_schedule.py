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


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_reaches_the_rate(schedule: str) -> None:
    assert rates(schedule)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_ends_at_the_floor(schedule: str) -> None:
    found = rates(schedule)
    assert found[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


def test_shapes() -> None:
    cosine, linear = rates("cosine"), rates("linear")
    middle = 10 + 30
    progress = 30 / 89
    assert cosine[middle] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    assert linear[middle] == pytest.approx(1 - 0.9 * progress)
    assert rates("constant")[-1] == 1.0
