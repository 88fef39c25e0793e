"""What is done to one shard of text, in whichever process: hash its documents, and turn them into tokens.

Results are files that are whole or absent, so that a preparation that was killed goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from llmmed.data import text
from llmmed.data.tokenizer import pieces, read
from llmmed.errors import UserError
from llmmed.files import write_atomically, write_json

if TYPE_CHECKING:
    import numpy.typing as npt
    from tokenizers import Tokenizer

DROPPED, TRAIN, VALIDATION, CUT = range(4)  # what becomes of a document
PARTS = {"train": TRAIN, "validation": VALIDATION}
_BATCH_CHARACTERS = 2**19


@dataclass(frozen=True)
class Scan:
    """Hashes the documents of a shard into `output`: [n] uint64 `whole` and `head`, and uint32 `length`."""

    shard: text.Shard
    output: Path


@dataclass(frozen=True)
class Tokenise:
    """Writes the tokens of a shard, each document followed by the end token, as `<output>.train` and `.validation`.

    `<output>.json`, written last, has the counts of both.
    """

    shard: text.Shard
    output: Path
    parts: Path  # [n] uint8 .npy: what becomes of each document
    cut: int  # characters of the one document that is CUT: those before go to the training part
    tokenizer: Path
    end_token: int
    dtype: str


def scan(task: Scan) -> None:
    """Raises `UserError` for text that cannot be read, with its position."""
    whole, heads, lengths = [], [], []
    for document in text.read(task.shard):
        whole.append(hash_of(document))
        heads.append(hash_of(head(document)))
        lengths.append(len(document))
    content = io.BytesIO()
    np.savez(
        content,
        whole=np.array(whole, dtype=np.uint64),
        head=np.array(heads, dtype=np.uint64),
        length=np.array(lengths, dtype=np.uint32),
    )
    write_atomically(task.output, content.getvalue())


def tokenise(task: Tokenise) -> None:
    """Raises `UserError` if the shard has not as many documents as when it was scanned."""
    tokenizer = _tokenizer(task.tokenizer)
    facts = {}
    with contextlib.ExitStack() as stack:
        files = {}
        for name in PARTS:
            files[name] = stack.enter_context(tempfile.NamedTemporaryFile(dir=task.output.parent, delete=False))
            stack.callback(Path(files[name].name).unlink, missing_ok=True)
            facts[name] = {"documents": 0, "bytes": 0, "tokens": 0}
        for part, batch in _batches(parted(task.shard, task.parts, task.cut)):
            name = "train" if part == TRAIN else "validation"
            _write_tokens(tokenizer, batch, task, files[name], facts[name])
        for name, file in files.items():
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, task.output.with_suffix(f".{name}"))
    write_json(task.output.with_suffix(".json"), facts)


def parted(shard: text.Shard, parts_file: Path, cut_at: int) -> Iterator[tuple[int, str]]:
    """The documents of a shard that are not dropped, each with its part; one that is cut comes as two.

    Raises `UserError` if there are not as many as were scanned.
    """
    parts: npt.NDArray[np.uint8] = np.load(parts_file)
    count = 0
    for document in text.read(shard):
        count += 1
        if count > len(parts):
            break
        if parts[count - 1] == CUT:
            before, after = cut(document, cut_at)
            yield from ((part, piece) for part, piece in ((TRAIN, before), (VALIDATION, after)) if piece.strip())
        elif parts[count - 1] != DROPPED:
            yield int(parts[count - 1]), document
    if count != len(parts):
        raise UserError(f"{shard.path}: the file changed while it was being prepared; start again")


def head(document: str) -> str:
    """What a document begins with: terms of the same name share it and stay in one part."""
    return document.partition(". ")[0].casefold()


def cut(document: str, position: int) -> tuple[str, str]:
    """Two parts, at the first end of a line, sentence or word in the half of what follows `position`, or right there.

    The half, so that the one line end near the end of a text does not leave the second part with nothing.
    """
    latest = (position + len(document)) // 2
    for end in ("\n", ". ", " "):
        found = document.find(end, position, latest)
        if found >= 0:
            return document[: found + len(end)], document[found + len(end) :]
    return document[:position], document[position:]


def hash_of(document: str) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big")


class _Piece(NamedTuple):
    text: str
    ends: bool  # with it ends its document


def _batches(documents: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[_Piece]]]:
    """Pieces of one part, together about `_BATCH_CHARACTERS` long; in order within a part."""
    waiting: dict[int, list[_Piece]] = {TRAIN: [], VALIDATION: []}
    size = dict.fromkeys(waiting, 0)
    for part, document in documents:
        left = len(document)
        for piece in pieces(document):
            left -= len(piece)
            waiting[part].append(_Piece(piece, ends=not left))
            size[part] += len(piece)
            if size[part] > _BATCH_CHARACTERS:
                yield part, waiting[part]
                waiting[part], size[part] = [], 0
    yield from ((part, batch) for part, batch in waiting.items() if batch)


def _write_tokens(
    tokenizer: Tokenizer, batch: Sequence[_Piece], task: Tokenise, file: IO[bytes], facts: dict[str, int]
) -> None:
    encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
    for piece, encoding in zip(batch, encodings, strict=True):
        ids = [*encoding.ids, task.end_token] if piece.ends else encoding.ids
        file.write(np.array(ids, dtype=task.dtype).tobytes())
        facts["tokens"] += len(ids)
        facts["documents"] += piece.ends
        facts["bytes"] += len(piece.text.encode())


_tokenizer = functools.lru_cache(maxsize=1)(read)
