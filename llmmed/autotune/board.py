"""Where processes that compile ahead share their work, and tell how far it is those who wait for it: a folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from llmmed.files import write_atomically

ALL, CLOCK, STEP = "all", "clock", "step"
"""Beside the names of ops, what may wait for a unit of work: every verdict, the times, or, for long, nobody."""


class Board:
    """Work is claimed, and finished, by name; an empty file each."""

    def __init__(self, folder: Path) -> None:
        self._announced, self._over = folder / "units.json", folder / "over"
        self._claimed, self._done = folder / "claimed", folder / "done"
        for each in (folder, self._claimed, self._done):
            each.mkdir(exist_ok=True)

    def announce(self, units: Mapping[str, int]) -> None:
        """Says how many units there are, by what waits for them; all processes say the same."""
        if not self._announced.exists():
            write_atomically(self._announced, json.dumps(units))

    def claim(self, name: str) -> bool:
        """Whether this process is the first to want a piece of work."""
        try:
            (self._claimed / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def finish(self, awaited_by: str, name: str, text: str) -> None:
        """Says that a piece of work is done, and a line about it for people."""
        (self._done / f"{awaited_by}.{name}").write_text(text, encoding="utf-8")

    def end(self) -> None:
        """Nothing is to be waited for any more, whatever is left."""
        self._over.touch()

    def is_awaited(self, *by: str) -> bool:
        """Whether units are still to come that any of these waits for; without a name, any at all."""
        if self._over.exists():
            return False
        if not self._announced.exists():
            return True
        wanted: dict[str, int] = json.loads(self._announced.read_text(encoding="utf-8"))
        done = Counter(path.name.partition(".")[0] for path in self._done.iterdir())
        return any(done[what] < count for what, count in wanted.items() if not by or what in by)

    def count(self, *, but: str) -> int:
        """How many pieces are done, those of one kind aside."""
        return sum(path.name.partition(".")[0] != but for path in self._done.iterdir())

    def finished(self, awaited_by: str = "", *, but: str = "") -> list[str]:
        """The lines about what is done: of one kind, or of all but one."""
        kinds = ((path, path.name.partition(".")[0]) for path in self._done.iterdir())
        return [path.read_text(encoding="utf-8") for path, kind in kinds if kind != but and awaited_by in ("", kind)]
