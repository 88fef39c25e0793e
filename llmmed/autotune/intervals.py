"""What samples say of a time, and pairs of samples of a difference: the middle, with a 95 % confidence interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

Interval = Callable[[Sequence[float]], tuple[float, float, float]]
"""From samples to their middle and the low and high end of its confidence interval."""

_NORMAL = 1.96  # standard deviations around the mean of a normal distribution that hold 95 % of it


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """The median and the ends of its 95 % confidence interval, by order statistics: no distribution is assumed.

    The ends have the same number of samples beyond them, as few as 95 % ask for (the binomial distribution, to half a
    sample). With few samples the interval is their whole range.
    """
    ordered = sorted(samples)
    n = len(ordered)
    low = max(0, math.floor((n - 1 - _NORMAL * math.sqrt(n)) / 2))
    high = n - 1 - low
    return median(ordered), ordered[low], ordered[high]


def difference_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """The middle of paired differences and the ends of its 95 % confidence interval, by Wilcoxon's signed ranks.

    The middle is the median of the means of all pairs (Hodges and Lehmann 1963), each sample with itself included; the
    ends are the means that the signed-rank test would just not reject (its normal approximation, to half a rank). It
    assumes that the differences do not depend on each other and lie evenly around their middle, as those of two things
    that take turns mostly do; of normal ones it needs two thirds of the samples that the interval of the median needs,
    of ones with long tails nearly as many. With fewer than seven samples the interval is their whole range.
    """
    n = len(differences)
    means = sorted((differences[i] + differences[j]) / 2 for i in range(n) for j in range(i + 1))
    ranks = n * (n + 1) / 2
    low = max(0, math.floor(ranks / 2 - _NORMAL * math.sqrt(ranks * (2 * n + 1) / 12) - 0.5))
    return median(means), means[low], means[-1 - low]
