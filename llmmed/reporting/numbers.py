"""Numbers, words and columns as every table and picture of the project has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

ABSENT = "\N{EN DASH}"
_R = TypeVar("_R")


@dataclass(frozen=True)
class Column(Generic[_R]):
    """A number of every row; its header has the unit, and may have two lines. Empty text if absent."""

    header: str
    value: Callable[[_R], str]

    @property
    def title(self) -> str:
        """The header in one line."""
        return self.header.replace("-\n", "").replace("\n", " ")


def digits(value: float | None) -> str:
    """`0.0412`, `4.12`, `41.2`, `4,120`: three significant digits without an exponent; empty if absent."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:.3g}"
    rounded = float(f"{value:.2e}")  # 99.97 has the digits of 100
    places = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{places}f}"


def number(value: float | None, form: str) -> str:
    """Empty if absent."""
    return "" if value is None else format(value, form)


def words(status: str) -> str:
    """`not_tried` for people."""
    return status.replace("_", " ")
