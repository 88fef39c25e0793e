"""`scripts/generate.py` tells of a mistake in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llmmed import generate
from llmmed.compose import as_dict
from llmmed.data import tokenizer
from llmmed.errors import UserError
from llmmed.export import TOKENIZER
from tests.training.tiny import build, tiny_config


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


def test_a_prompt_that_spells_a_special_token_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the training's text and samples: only the end token that begins a document is special."""
    tokenizer.train_bpe(["a few words"], 300).save(str(tmp_path / TOKENIZER))
    end, end_id = tokenizer.end_of(tmp_path)
    config = tiny_config("model.vocab_size=300")
    found = SimpleNamespace(state={"config": as_dict(config)}, model=build(config).state_dict(), step=1)
    given: list[int] = []
    monkeypatch.setattr(generate, "best_or_newest", lambda run: found)
    monkeypatch.setattr(generate, "sample", lambda model, prompt, **_: given.extend(prompt) or ())
    assert [*generate.generate(generate.Request(tmp_path, end))] == [end]
    assert given[0] == end_id
    assert len(given) > 2
    assert end_id not in given[1:]


def test_what_is_allowed_is_taken() -> None:
    expected = generate.Request(Path("run"), "Das Herz schlägt", 100_000, 1e-40, 1.0, 2**63 - 1)
    given = ["prompt=Das Herz schlägt", "max_tokens=100000", "temperature=1e-40", "top_p=1", f"seed={2**63 - 1}"]
    assert generate.parse(["run", *given]) == expected
