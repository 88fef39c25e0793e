"""`scripts/generate.py` tells of a mistake in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmmed import generate
from llmmed.errors import UserError


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("temperature=nan", "temperature is 0 or more, and finite"),
        ("temperature=inf", "temperature is 0 or more, and finite"),
        ("max_tokens=100000000000", "max_tokens=100000000000: from 1 to 100000"),
        ("max_tokens=0", "from 1 to 100000"),
        ("seed=99999999999999999999", "from 0 to 2^63 - 1"),
        ("prompt=\udcff", "the prompt is not valid UTF-8"),
        ("top_p=nan", "top_p above 0"),
    ],
)
def test_a_value_that_cannot_be_is_refused(argument: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        generate.parse(["run", argument])
    assert told in str(caught.value)


def test_what_is_allowed_is_taken() -> None:
    expected = generate.Request(Path("run"), "Das Herz schlägt", 100_000, 1e-40, 1.0, 2**63 - 1)
    given = ["prompt=Das Herz schlägt", "max_tokens=100000", "temperature=1e-40", "top_p=1", f"seed={2**63 - 1}"]
    assert generate.parse(["run", *given]) == expected
