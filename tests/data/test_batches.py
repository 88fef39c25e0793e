"""Batches are pure functions of seed and index, and an epoch visits every window once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmmed.data import Batches
from llmmed.errors import UserError

TOKENS = np.arange(10 * 8 + 1, dtype=np.uint16)  # ten windows of eight tokens and the one that follows


def starts(batch: torch.Tensor) -> list[int]:
    return [int(row[0]) // 8 for row in batch]


def test_a_batch_depends_on_seed_and_index_alone() -> None:
    first, second = (Batches(TOKENS, 8, 3, seed=5, shuffle=True) for _ in range(2))
    expected = [first.get(i) for i in range(9)]
    for index in (7, 0, 8, 3):
        assert torch.equal(second.get(index), expected[index])
    other = Batches(TOKENS, 8, 3, seed=6, shuffle=True)
    assert any(not torch.equal(other.get(i), expected[i]) for i in range(3))


def test_inputs_and_targets_are_one_window() -> None:
    batch = Batches(TOKENS, 8, 2, seed=0, shuffle=True).get(0)
    assert batch.shape == (2, 9)
    assert batch.dtype == torch.int64
    assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)


def test_every_epoch_visits_every_window_once_in_an_order_of_its_own() -> None:
    batches = Batches(TOKENS, 8, 5, seed=1, shuffle=True)
    epochs = [starts(batches.get(2 * e)) + starts(batches.get(2 * e + 1)) for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_epochs_join_where_the_batch_does_not_divide_them() -> None:
    batches = Batches(TOKENS, 8, 3, seed=1, shuffle=True)
    visited = [start for i in range(10) for start in starts(batches.get(i))]  # thirty windows: three epochs
    assert sorted(visited) == sorted(list(range(10)) * 3)


def test_a_batch_may_begin_at_any_window() -> None:
    whole, batches = Batches(TOKENS, 8, 30, seed=1, shuffle=True).get(0), Batches(TOKENS, 8, 4, seed=1, shuffle=True)
    for first in (0, 3, 8, 26):
        assert torch.equal(batches.beginning(first), whole[first : first + 4])


def test_without_shuffling_the_order_is_that_of_the_text() -> None:
    assert starts(Batches(TOKENS, 8, 4, seed=3, shuffle=False).get(0)) == [0, 1, 2, 3]


def test_data_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.seq_len=8 .* validation has 8 tokens; use train\.seq_len=7"):
        Batches(TOKENS[:8], 8, 1, seed=0, shuffle=False, name="validation")
