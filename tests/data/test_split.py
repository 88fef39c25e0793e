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
    assert found.note is None


def test_groups_stay_whole_and_fill_the_quota(tmp_path: Path) -> None:
    heads = [head for head in range(200) for _ in range(head % 7 + 1)]
    found = split([scan(tmp_path / "a.npz", heads)], 0.1, None)
    assert held_out(found) == round(0.1 * len(heads))
    for head in range(200):
        assert len({int(part) for part, its in zip(found.parts, heads, strict=True) if its == head}) == 1


def test_where_no_group_is_small_enough_it_is_said(tmp_path: Path) -> None:
    found = split([scan(tmp_path / "a.npz", [0] * 600 + [1] * 400)], 0.05, None)
    assert held_out(found) == 400
    assert "400 of 1,000 documents are for validation, 40%" in str(found.note)


def files(folder: Path, sizes: list[int]) -> tuple[list[Path], list[str]]:
    """Scans of files with so many paragraphs, all of which begin differently."""
    starts = np.cumsum([0, *sizes])
    scans = []
    for number, (start, size) in enumerate(zip(starts[:-1], sizes, strict=True)):
        path = folder / f"{number}.npz"
        hashes = np.random.default_rng(number).integers(0, 2**64, size, dtype=np.uint64)
        whole = np.arange(start, start + size, dtype=np.uint64)
        np.savez(path, whole=whole, head=hashes, length=np.full(size, 40, dtype=np.uint32))
        scans.append(path)
    return scans, [f"notes/{number}.txt" for number in range(len(sizes))]


def in_both_parts(found: Split, sizes: list[int]) -> int:
    return sum(len(np.unique(part)) > 1 for part in np.split(found.parts, np.cumsum(sizes)[:-1]))


@pytest.mark.parametrize(("sizes", "expected"), [([6] * 100, 30), ([100] * 10, 100), ([1000, *[6] * 100], 78)])
def test_paragraphs_of_one_file_stay_in_one_part(sizes: list[int], expected: int, tmp_path: Path) -> None:
    scans, names = files(tmp_path, sizes)
    found = split(scans, 0.05, None, names)
    assert held_out(found) == expected
    assert in_both_parts(found, sizes) == 0
    assert found.note is None
    assert in_both_parts(split(scans, 0.05, None), sizes) > 1, "this would show nothing"


@pytest.mark.parametrize("sizes", [[1000] * 3, [10_000, 6, 6]])  # too large; too small but for one
def test_files_too_large_to_be_held_out_are_split_by_paragraph_and_it_is_said(sizes: list[int], tmp_path: Path) -> None:
    scans, names = files(tmp_path, sizes)
    found = split(scans, 0.05, None, names)
    assert held_out(found) == round(0.05 * sum(sizes))
    assert "files have some in both parts" in str(found.note)
