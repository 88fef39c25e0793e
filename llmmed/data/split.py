"""Which document is for training and which for validation: by a hash of its file or of what it begins with, so that
nothing leaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmmed.data.shards import CUT, DROPPED, TRAIN, VALIDATION, hash_of
from llmmed.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class Split:
    """What becomes of every document of a source, in order, and where the one that is cut is cut."""

    parts: npt.NDArray[np.uint8]  # [documents]
    cut: int = 0  # characters
    note: str | None = None  # what to say about it


def split(scans: list[Path], fraction: float, max_documents: int | None, files: Sequence[str | None] = ()) -> Split:
    """Splits a source by the scans of its shards: duplicates are dropped, and what belongs together stays together.

    That is a file of paragraphs where `files` names that of each shard, else documents that begin alike. Files too
    large for it are split like one alone. Text too short to be split by documents is split by position. Raises
    `UserError` if there is no text.
    """
    whole = _gather(scans, "whole") if scans else np.zeros(0, dtype=np.uint64)
    parts = np.full(len(whole), DROPPED, dtype=np.uint8)
    kept = np.sort(np.unique(whole, return_index=True)[1])[:max_documents]
    del whole
    if not len(kept):
        raise UserError("the data has no text; every document is empty")
    quota, note = round(fraction * len(kept)), None
    if 0 < quota < len(kept):
        validation = np.zeros(0, dtype=np.bool_)
        if any(files):
            validation = _drawn(_of_files(scans, files)[kept], quota)
            if not quota / 2 <= validation.sum() <= 2 * quota:
                validation = validation[:0]
                note = (
                    f"no files make up data.validation_fraction={fraction:g} of the paragraphs: each is taken for a "
                    f"document of its own, so that files have some in both parts"
                )
        if not len(validation):
            validation = _drawn(_gather(scans, "head")[kept], quota)
        if not validation.all():
            parts[kept] = np.where(validation, VALIDATION, TRAIN)
            return Split(parts, note=note or _surprising(int(validation.sum()), len(kept), fraction))
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

    If that is less than half, the smallest of the others too, unless it is far too large and not the only one.
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
    if room > quota / 2 and not drawn.all():
        smallest = int(np.where(drawn, sizes.max() + 1, sizes).argmin())
        drawn[smallest] = room == quota or sizes[smallest] <= quota + room
    return drawn[members]


def _of_files(scans: list[Path], files: Sequence[str | None]) -> npt.NDArray[np.unsignedinteger]:
    """[documents] what each belongs to: its file where that is named, else what it begins with."""
    groups = []
    for path, file in zip(scans, files, strict=True):
        heads = _gather([path], "head")
        groups.append(heads if file is None else np.full_like(heads, hash_of(file)))
    return np.concatenate(groups)


def _surprising(chosen: int, count: int, fraction: float) -> str | None:
    """What to say where the validation part is of another size than was asked for."""
    if fraction / 2 <= chosen / count <= 2 * fraction:
        return None
    return (
        f"{chosen:,} of {count:,} documents are for validation, {chosen / count:.0%}, and not "
        f"data.validation_fraction={fraction:g}: documents that begin alike stay together, and so few kinds are there"
    )


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
