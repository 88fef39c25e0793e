"""Batches of windows over packed tokens, each a pure function of seed and index: resuming needs no state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmmed.data.mixture import Mixture
from llmmed.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Tokens = npt.NDArray[np.integer]


class Batches:
    """Windows of `seq_len + 1` tokens, the last of one being the first of the next: inputs and targets in one.

    Args:
        tokens: [n] packed token ids, or a mixture of several sources, each with epochs of its own.
        seq_len: Inputs of a window, in tokens.
        batch_size: Windows a batch.
        seed: Of the order.
        shuffle: Each epoch visits every window once, in an order of its own; without it, in the order of the text.
        name: What to call the tokens in a message.

    Raises:
        UserError: there is not one window.
    """

    def __init__(
        self, tokens: Tokens | Mixture, seq_len: int, batch_size: int, seed: int, shuffle: bool, name: str = "data"
    ) -> None:
        self._mixture = tokens if isinstance(tokens, Mixture) else None
        parts = {"": tokens} if not isinstance(tokens, Mixture) else tokens.parts
        self._windows = {
            key: _Windows(part, seq_len, seed, shuffle, f"{name}, source {key}," if key else name)
            for key, part in parts.items()
        }
        self.n_windows = sum(windows.count for windows in self._windows.values())
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed

    def get(self, index: int) -> torch.Tensor:
        """Batch `index`, counted from 0 without end: [batch_size, seq_len + 1] int64 on the CPU."""
        return self.beginning(index * self._batch_size)

    def beginning(self, first: int) -> torch.Tensor:
        """A batch as `get` gives it, of the windows from number `first` on, counted from 0 without end."""
        import torch

        rows = np.empty((self._batch_size, self._seq_len + 1), dtype=np.int64)
        for row in range(self._batch_size):
            key, number = self._mixture.draw(first + row, self._seed) if self._mixture else ("", first + row)
            rows[row] = self._windows[key].get(number)
        return torch.from_numpy(rows)


class _Windows:
    """The windows of one source, epoch after epoch."""

    def __init__(self, tokens: Tokens, seq_len: int, seed: int, shuffle: bool, name: str) -> None:
        self.count = (len(tokens) - 1) // seq_len
        if self.count < 1:
            raise UserError(
                f"train.seq_len={seq_len} is longer than the data: {name} has {len(tokens)} tokens; "
                f"use train.seq_len={max(2, len(tokens) - 1)} or less, or more text"
            )
        self._tokens, self._seq_len, self._seed, self._shuffle = tokens, seq_len, seed, shuffle
        self._order: tuple[int, npt.NDArray[np.integer]] | None = None  # of the epoch asked for last

    def get(self, number: int) -> Tokens:
        epoch, position = divmod(number, self.count)
        start = int(self._epoch_order(epoch)[position]) * self._seq_len
        return self._tokens[start : start + self._seq_len + 1]

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.integer]:
        kept = self._order  # read once: another thread may ask for another epoch meanwhile
        if kept is not None and kept[0] == epoch:
            return kept[1]
        order = np.arange(self.count)
        if self._shuffle:
            np.random.default_rng((self._seed, epoch)).shuffle(order)
        self._order = (epoch, order)
        return order
