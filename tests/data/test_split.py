"""What is held out: about as much as asked for, and never a part of what belongs together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmmed.data.shards import TRAIN, VALIDATION
from llmmed.data.split import Split, split


def scan(path: Path, heads: list[int]) -> Path:
    """The scan of a shard of different documents that begin as `heads` says."""
    spread = np.random.default_rng(0).integers(0, 2**64, 1400, dtype=np.uint64)[heads]
    whole = np.arange(len(heads), dtype=np.uint64)
    np.savez(path, whole=whole, head=spread, length=np.full(len(heads), 40, dtype=np.uint32))
    return path


def held_out(found: Split) -> int:
    return int((found.parts == VALIDATION).sum())


@pytest.mark.parametrize("common", range(20))  # another head each, so that it comes early and late in the order
def test_a_common_beginning_does_not_take_over(common: int, tmp_path: Path) -> None:
    heads = [common] * 600 + list(range(1000, 1400))
    found = split([scan(tmp_path / "a.npz", heads)], 0.05, None)
    assert held_out(found) == 50
    assert (found.parts[:600] == TRAIN).all()
    assert found.complaint(0.05) is None


def test_groups_stay_whole_and_fill_the_quota(tmp_path: Path) -> None:
    heads = [head for head in range(200) for _ in range(head % 7 + 1)]
    found = split([scan(tmp_path / "a.npz", heads)], 0.1, None)
    assert held_out(found) == round(0.1 * len(heads))
    for head in range(200):
        assert len({int(part) for part, its in zip(found.parts, heads, strict=True) if its == head}) == 1


def test_where_no_group_is_small_enough_it_is_said(tmp_path: Path) -> None:
    found = split([scan(tmp_path / "a.npz", [0] * 600 + [1] * 400)], 0.05, None)
    assert held_out(found) == 400
    assert found.complaint(0.05) is not None
    assert "400 of 1,000 documents are for validation, 40%" in str(found.complaint(0.05))
