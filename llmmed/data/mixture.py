"""A weighted mixture of token arrays: which source a window comes from is a pure function of seed and index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from llmmed.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt

    Tokens = npt.NDArray[np.integer]

BLOCK = 1000  # windows in which every source has exactly its share


class Mixture:
    """Packed tokens of several sources and their weights. `len` is the number of all tokens.

    Raises:
        UserError: a weight is so small that a source would never be drawn.
    """

    def __init__(self, parts: Mapping[str, Tokens], weights: Mapping[str, float]) -> None:
        self.parts = dict(parts)
        shares = np.array([weights[name] for name in self.parts])
        shares = shares / shares.sum() * BLOCK
        quotas = np.floor(shares).astype(int)
        quotas[np.argsort(quotas - shares, kind="stable")[: BLOCK - quotas.sum()]] += 1
        for name, quota in zip(self.parts, quotas, strict=True):
            if not quota:
                raise UserError(
                    f"data.weights.{name}={weights[name]} is less than 1/{BLOCK} of all weights, so that the source "
                    f"would never be drawn; give it more, or take it out with ~data.sources.{name} ~data.weights.{name}"
                )
        self._quotas = quotas
        self._order: tuple[int, int, npt.NDArray[np.integer], npt.NDArray[np.integer]] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def draw(self, index: int, seed: int) -> tuple[str, int]:
        """The source of window `index`, counted from 0 without end, and the number of windows it gave before."""
        block, position = divmod(index, BLOCK)
        kept = self._order  # read once: another thread may ask for another block meanwhile
        if kept is None or kept[:2] != (seed, block):
            sources = np.repeat(np.arange(len(self._quotas)), self._quotas)
            np.random.default_rng((seed, block)).shuffle(sources)
            before = np.zeros(BLOCK, dtype=np.int64)
            for source in range(len(self._quotas)):
                before[sources == source] = np.arange(self._quotas[source])
            self._order = kept = (seed, block, sources, before)
        source = int(kept[2][position])
        return list(self.parts)[source], block * int(self._quotas[source]) + int(kept[3][position])

    def mean(self, values: Mapping[str, float]) -> float:
        """The mean of a value of each source, as often as its windows are drawn."""
        names = list(self.parts)
        return sum(values[name] * int(quota) for name, quota in zip(names, self._quotas, strict=True)) / BLOCK
