"""What comes from a network is kept as it comes: an interruption costs no document, and none comes twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmmed.compose import compose
from llmmed.data import spool, text
from llmmed.data.hub import HubSource
from llmmed.data.spool import Listed, Position, Source

DOCUMENTS = [f"Document {i} \u5fc3\u81d3." for i in range(100)]


class Interrupted(Listed):
    """Ends with an error after some documents."""

    def __init__(self, documents: list[str], after: int) -> None:
        super().__init__(documents)
        self._after = after

    def documents(self, start: Position | None) -> Iterator[str]:
        for number, document in enumerate(super().documents(start)):
            if number == self._after:
                raise ConnectionError("gone")
            yield document


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "SHARD_BYTES", 400)


def spooled(folder: Path, source: Source, most: int | None = None) -> list[str]:
    shards = spool.spool(lambda: source, folder, most, lambda size: None)
    return [document for shard in shards for document in text.read(shard)]


def sources(folder: Path) -> Iterator[Source]:
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    yield Listed(DOCUMENTS)
    for streaming in ("true", "false"):
        config = compose(["data=hub", f"data.path='{folder}/rows'", f"data.streaming={streaming}"])
        yield HubSource(config.data, print)


def test_every_source_goes_on_from_its_position(tmp_path: Path) -> None:
    for source in sources(tmp_path):
        documents = source.documents(None)
        first = [next(documents) for _ in range(30)]
        middle = json.loads(json.dumps(source.position()))
        first += [next(documents) for _ in range(20)]
        assert first == DOCUMENTS[:50]
        assert list(source.documents(middle)) == DOCUMENTS[30:]
        assert list(source.documents(None)) == DOCUMENTS


def test_an_interrupted_spool_goes_on_after_what_it_has(tmp_path: Path) -> None:
    for after in (0, 25, 25, 3):
        with pytest.raises(ConnectionError):
            spooled(tmp_path, Interrupted(DOCUMENTS, after))
    assert json.loads((tmp_path / "spool.json").read_text())["documents"] > 30
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    assert spooled(tmp_path, Listed(DOCUMENTS)) == DOCUMENTS
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert spooled(tmp_path, Interrupted(DOCUMENTS, 0)) == DOCUMENTS  # complete: nothing is asked for


def test_a_bounded_amount_is_all_that_is_asked_for(tmp_path: Path) -> None:
    assert spooled(tmp_path, Interrupted(["", *DOCUMENTS], 43), most=42) == DOCUMENTS[:42]


def test_nothing_is_nothing(tmp_path: Path) -> None:
    assert spooled(tmp_path, Listed(["", " \n"])) == []
