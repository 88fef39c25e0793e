"""Numbers for people: three digits whatever the size, and nowhere else than in `reporting/numbers.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmmed.reporting.numbers import Column, digits


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, ""), (0.0, "0"), (1e-5, "0.0000100"), (0.0412, "0.0412"), (0.0999, "0.0999"), (0.09999, "0.100"),
        (1.0, "1.00"), (9.996, "10.0"), (41.25, "41.2"), (99.94, "99.9"), (99.97, "100"), (999.6, "1,000"),
        (4120.4, "4,120"), (-3.14159, "-3.14"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_three_digits(value: float | None, told: str) -> None:
    assert digits(value) == told


def test_a_header_of_two_lines_in_one() -> None:
    assert [Column[int](text, str).title for text in ("speed-\nup", "step\nms")] == ["speedup", "step ms"]


def test_there_is_one_way_to_write_a_number(repository: Path) -> None:
    again = re.compile(r"#\.3g|class _?Column|def _?(milliseconds|three_digits|short|digits|number)\b")
    found = [
        f"{path.name}: {line}"
        for folder in ("reporting", "benchmark")
        for path in sorted((repository / "llmmed" / folder).glob("*.py"))
        if path.name != "numbers.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if again.search(line)
    ]
    assert found == []
