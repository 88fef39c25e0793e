"""Confidence intervals hold what they promise to hold, as often as they promise it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import NormalDist

import pytest

from llmmed.autotune.intervals import Interval, difference_interval, median_interval


@pytest.mark.parametrize(("n", "interval"), [(1, (0, 0)), (7, (0, 6)), (15, (3, 11)), (100, (39, 60))])
def test_the_interval_of_the_median(n: int, interval: tuple[int, int]) -> None:
    _, low, high = median_interval(range(n))
    assert (low, high) == interval


def test_the_interval_holds_the_median_of_all_with_95_percent() -> None:
    """The k-th of n samples is above it as rarely as a coin shows fewer than k heads. One sample less on each side
    would be too few."""
    for n in range(6, 101):
        _, low, high = median_interval(range(n))
        assert low == n - 1 - high
        wide, narrow = (1 - 2 * sum(math.comb(n, i) for i in range(int(low) + k)) / 2**n for k in (1, 2))
        assert wide >= 0.95 > narrow - 0.002, n


@pytest.mark.parametrize(
    ("differences", "interval"),
    [
        ([3.0], (3.0, 3.0, 3.0)),
        ([1.0, 2.0, 4.0], (2.25, 1.0, 4.0)),  # means 1, 1.5, 2, 2.5, 3, 4
        # 21 means of 0, 1, 2, 4, 8, 16; the test with six samples rejects at one rank sum of 64, so at the outermost
        ([16.0, 0.0, 8.0, 1.0, 4.0, 2.0], (4.0, 0.0, 16.0)),
    ],
)
def test_the_interval_of_differences(differences: list[float], interval: tuple[float, float, float]) -> None:
    assert difference_interval(differences) == interval


def test_the_ends_are_those_of_the_signed_rank_test() -> None:
    """Beyond an end, the ranks of the positive differences sum to what less than one in forty of all signs does."""
    chance = random.Random(1)
    for n in (8, 12, 15):
        differences = [chance.gauss(0.0, 1.0) for _ in range(n)]
        _, low, high = difference_interval(differences)
        sums = [0] * (n * (n + 1) // 2 + 1)  # how many of the 2^n sets of ranks have each sum
        sums[0] = 1
        for rank in range(1, n + 1):
            for total in range(len(sums) - 1, rank - 1, -1):
                sums[total] += sums[total - rank]

        def p(middle: float, differences: list[float] = differences, sums: list[int] = sums, n: int = n) -> float:
            ranked = sorted((x - middle for x in differences), key=abs)
            found = sum(rank for rank, x in enumerate(ranked, 1) if x > 0)
            return float(sum(sums[: min(found, len(sums) - 1 - found) + 1]) / 2**n)

        inside, outside = 1e-9, -1e-9
        assert min(p(low + inside), p(high - inside)) > 0.02
        assert max(p(low + outside), p(high - outside)) < 0.035


@pytest.mark.parametrize(
    "draw",
    [
        lambda chance: chance.gauss(0.0, 1.0),
        lambda chance: chance.gauss(0.0, 1.0) * (10.0 if chance.random() < 0.1 else 1.0),  # a busy machine
        lambda chance: chance.uniform(-1.0, 1.0),
    ],
    ids=["normal", "outliers", "uniform"],
)
@pytest.mark.parametrize("n", [9, 15, 30])
def test_the_interval_holds_the_middle_of_all_differences(n: int, draw: Callable[[random.Random], float]) -> None:
    chance, tries = random.Random(n), 1500
    held = sum(low <= 0.0 <= high for low, high in _ends(difference_interval, n, draw, chance, tries))
    assert held / tries > 0.95 - 3 * math.sqrt(0.05 * 0.95 / tries)


def test_differences_are_known_with_fewer_samples_than_medians_are() -> None:
    """In theory 2 / 3 as many; and the ends of a median are whole samples, which makes its interval wider still."""
    chance = random.Random(0)
    draw: Callable[[random.Random], float] = lambda chance: chance.gauss(0.0, 1.0)  # noqa: E731
    narrow, wide = (
        sum(high - low for low, high in _ends(interval, 25, draw, chance, 300)) / 300
        for interval in (difference_interval, median_interval)
    )
    assert narrow < 0.86 * wide
    assert narrow == pytest.approx(2 * NormalDist().inv_cdf(0.975) / math.sqrt(25 * 3 / math.pi), rel=0.06)


def _ends(
    interval: Interval, n: int, draw: Callable[[random.Random], float], chance: random.Random, tries: int
) -> list[tuple[float, float]]:
    found = (interval([draw(chance) for _ in range(n)]) for _ in range(tries))
    return [(low, high) for _, low, high in found]
