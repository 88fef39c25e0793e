"""Documents that come one after another, from the network or a package, written to disk in shards as they come.

From the shards on they are text like any other. What is on disk stays: a run that was killed goes on after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from llmmed.data.text import SHARD_BYTES, Shard
from llmmed.files import read_json, write_atomically, write_json

_FIELD = "text"
Position = dict[str, Any]  # JSON


class Source(Protocol):
    """Documents in an order that does not change."""

    def documents(self, start: Position | None) -> Iterator[str]:
        """The documents that follow a position; all for None."""
        ...

    def position(self) -> Position:
        """Right after the document that was given last."""
        ...


class Listed:
    """Documents that are in memory."""

    def __init__(self, documents: list[str]) -> None:
        self._documents, self._next = documents, 0

    def documents(self, start: Position | None) -> Iterator[str]:
        self._next = start["next"] if start else 0
        while self._next < len(self._documents):
            self._next += 1
            yield self._documents[self._next - 1]

    def position(self) -> Position:
        return {"next": self._next}


def spool(
    open_source: Callable[[], Source], folder: Path, max_documents: int | None, advance: Callable[[int], None]
) -> list[Shard]:
    """The shards of a source, complete.

    Args:
        open_source: Called only if something is missing.
        folder: Holds the shards and `spool.json`, which says how far they are.
        max_documents: Where to stop.
        advance: Is told the bytes of each shard.
    """
    journal = folder / "spool.json"
    state: dict[str, Any] = {"sizes": [], "documents": 0, "position": None, "complete": False}
    if journal.exists():
        state = read_json(journal)
    if not state["complete"]:
        source = open_source()
        for size in state["sizes"]:
            advance(size)
        for lines, complete in _lines(source, state["position"], (max_documents or 2**62) - state["documents"]):
            content = "".join(lines)
            write_atomically(_file(folder, len(state["sizes"])), content)
            state["sizes"].append(len(content))
            state["documents"] += len(lines)
            state["position"], state["complete"] = source.position(), complete
            write_json(journal, state)
            advance(len(content))
    return [
        Shard(str(_file(folder, number)), 0, size, _FIELD, size) for number, size in enumerate(state["sizes"]) if size
    ]


def _lines(source: Source, start: Position | None, most: int) -> Iterator[tuple[list[str], bool]]:
    """Lines of JSON for one shard after the other, and whether it is the last one."""
    lines: list[str] = []
    size = count = 0
    for document in source.documents(start):
        if not document.strip():
            continue
        lines.append(json.dumps({_FIELD: document}) + "\n")
        size += len(lines[-1])
        count += 1
        if count >= most:
            break
        if size >= SHARD_BYTES:
            yield lines, False
            lines, size = [], 0
    yield lines, True


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.jsonl"
