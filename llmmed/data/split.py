"""Which document is for training and which for validation: by a hash of what it begins with, so that nothing leaks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmmed.data.shards import CUT, DROPPED, TRAIN, VALIDATION
from llmmed.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class Split:
    """What becomes of every document of a source, in order, and where the one that is cut is cut."""

    parts: npt.NDArray[np.uint8]  # [documents]
    cut: int  # characters

    def complaint(self, fraction: float) -> str | None:
        """What to say where far more than `fraction` of the documents is for validation, or None."""
        counts = [int((self.parts == part).sum()) for part in (TRAIN, VALIDATION)]
        share = counts[1] / max(1, sum(counts))
        if self.cut or share <= 2 * fraction:
            return None
        return (
            f"{counts[1]:,} of {sum(counts):,} documents are for validation, {share:.0%}, and not "
            f"data.validation_fraction={fraction:g}: documents that begin alike stay together, and so few kinds are there"
        )


def split(scans: list[Path], fraction: float, max_documents: int | None) -> Split:
    """Splits a source by the scans of its shards: duplicates are dropped, terms of the same name stay together.

    Text too short to be split by documents is split by position. Raises `UserError` if there is no text.
    """
    whole = _gather(scans, "whole") if scans else np.zeros(0, dtype=np.uint64)
    parts = np.full(len(whole), DROPPED, dtype=np.uint8)
    kept = np.sort(np.unique(whole, return_index=True)[1])[:max_documents]
    del whole
    if not len(kept):
        raise UserError("the data has no text; every document is empty")
    heads = _gather(scans, "head")[kept]
    chosen = round(fraction * len(heads))
    if 0 < chosen < len(heads):
        validation = _drawn(heads, chosen)
        if not validation.all():
            parts[kept] = np.where(validation, VALIDATION, TRAIN)
            return Split(parts, 0)
    return _by_position(parts, kept, _gather(scans, "length"), fraction)


def drop_leaks(splits: list[Split], scans: list[list[Path]]) -> None:
    """Drops from every source's training part what another source has for validation."""
    heads = [_gather(paths, "head") for paths in scans]
    held_out = [np.unique(h[s.parts >= VALIDATION]) for h, s in zip(heads, splits, strict=True)]
    for number, (its_heads, its_split) in enumerate(zip(heads, splits, strict=True)):
        others = np.concatenate(held_out[:number] + held_out[number + 1 :])
        its_split.parts[(its_split.parts == TRAIN) & np.isin(its_heads, others)] = DROPPED


def _drawn(groups: npt.NDArray[np.unsignedinteger], quota: int) -> npt.NDArray[np.bool_]:
    """Which documents are drawn: whole groups in the order of their hashes, without those for which there is no room.

    If there is room for none, the smallest.
    """
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    ends, drawn = np.cumsum(sizes), np.zeros(len(names), dtype=np.bool_)
    room, start = quota, 0
    while room and (fits := sizes[start:] <= room).any():
        start += int(fits.argmax())
        stop = int(np.searchsorted(ends, ends[start] - sizes[start] + room, side="right"))
        drawn[start:stop] = True
        room -= int(sizes[start:stop].sum())
        start = stop
    if not drawn.any():
        drawn[sizes.argmin()] = True
    return drawn[members]


def _by_position(
    parts: npt.NDArray[np.uint8], kept: npt.NDArray[np.intp], lengths: npt.NDArray[np.unsignedinteger], fraction: float
) -> Split:
    ends = np.cumsum(lengths[kept], dtype=np.int64)
    cut = min(max(1, round((1 - fraction) * int(ends[-1]))), int(ends[-1]) - 1)
    divided = int(np.searchsorted(ends, cut, side="right"))
    parts[kept[:divided]] = TRAIN
    parts[kept[divided]] = CUT
    parts[kept[divided + 1 :]] = VALIDATION
    return Split(parts, cut - int(ends[divided - 1]) if divided else cut)


def _gather(scans: list[Path], name: str) -> npt.NDArray[np.unsignedinteger]:
    arrays = []
    for path in scans:
        with np.load(path) as scan:
            arrays.append(scan[name])
    return np.concatenate(arrays)
