"""The user's own text, a `.txt`, `.jsonl` or `.parquet` file or a folder of them, read in shards of bounded size."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from llmmed.config import DataConfig
from llmmed.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet

SUFFIXES = (".txt", ".jsonl", ".parquet")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")
SHARD_BYTES = 8 * 2**20
_MOST_NULS = 0.01  # of the characters; in UTF-16 every second one of English is, and every space of Russian
_BLANK_LINES = re.compile(r"\n\s*\n")
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8: no character begins with one
_BLANK_LINES_IN_BYTES = re.compile(rb"\n\s*\n")


@dataclass(frozen=True)
class Shard:
    """A part of a file that is read alone: bytes of a `.txt` or `.jsonl`, row groups of a `.parquet` file."""

    path: str
    start: int
    end: int
    field: str
    size: int  # in bytes, to tell progress
    file: str | None = None  # of paragraphs that stay together: its name within the folder


def files(config: DataConfig) -> list[Path]:
    """The files that `data.path` names, sorted. Raises `UserError` if there are none or all are empty."""
    if config.path is None:
        raise UserError(f"data=text needs data.path=<a {', '.join(SUFFIXES)} file, or a folder of them>")
    path = Path(config.path)
    if not path.exists():
        raise UserError(f"data.path={config.path}: there is no such file or folder")
    everything = list(_below(path))
    found = sorted(p for p in everything if _kind(p) in SUFFIXES)
    if not found:
        packed = "; unpack what is packed" if any(_kind(p) in _PACKED for p in everything) else ""
        raise UserError(
            f"data.path={config.path}: nothing to read; files end with {', '.join(SUFFIXES)}, and what is there is "
            f"{_counts(everything) or 'nothing'}{packed}"
        )
    if not any(p.stat().st_size for p in found):
        raise UserError(f"data.path={config.path}: {'the file is' if len(found) == 1 else 'all files are'} empty")
    return found


def holds(config: DataConfig, size: int) -> bool:
    """Whether there are so many bytes to read, or a .parquet file, which is packed. Looks no further than it must."""
    if config.path is None:
        return False
    path, found = Path(config.path), 0
    for file in _below(path):
        if _kind(file) in SUFFIXES and file.is_file():
            found += max(file.stat().st_size, size if _kind(file) == ".parquet" and file.stat().st_size else 0)
            if found >= size:
                return True
    return False


def left_out(config: DataConfig) -> str | None:
    """How many files of the folder are not read, by what they end with, or None if all are."""
    return _counts([path for path in _below(Path(str(config.path))) if _kind(path) not in SUFFIXES]) or None


def shards(config: DataConfig, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """All files cut where documents end, into parts of about `shard_bytes`. Raises `UserError`."""
    found, paths = [], files(config)
    several = sum(_kind(path) == ".txt" for path in paths) > 1
    for path in paths:
        file = path.relative_to(str(config.path)).as_posix() if several and _kind(path) == ".txt" else None
        with _telling_of_loss(path):
            cut = _row_groups if _kind(path) == ".parquet" else _byte_ranges
            for start, end, size in cut(path, shard_bytes):
                found.append(Shard(str(path), start, end, config.text_field, size, file))
    return found


def read(shard: Shard) -> Iterator[str]:
    """The documents of a shard in their order, without empty ones. Raises `UserError` that names file and position.

    A document is a record of a .jsonl or .parquet file, or a paragraph of a .txt file: what stands between blank lines.
    A paragraph longer than a shard is cut at the end of a line.
    """
    path = Path(shard.path)
    reader = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}[_kind(path)]
    with _telling_of_loss(path):
        for document in reader(path, shard):
            if stripped := document.strip():
                yield stripped


def _below(path: Path) -> Iterator[Path]:
    """The file, or all files of the folder and of folders that it links to. Raises `UserError` if one is unreadable."""
    if not path.is_dir():
        yield path
        return

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"data.path: the folder {error.filename} cannot be read ({error.strerror})")

    seen = set()
    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:  # a link to a folder around it
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        # Whatever the order on disk, a folder has its own name and not that of a link to it.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        yield from (file for name in names if (file := Path(folder, name)).is_file())


def _kind(path: Path) -> str:
    return path.suffix.lower()


def _counts(paths: list[Path]) -> str:
    counts = Counter(_kind(path) or "without an ending" for path in paths)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def unpaired_surrogate(document: str) -> str | None:
    """The first character that UTF-8 cannot write (JSON can name half a pair), or None."""
    try:
        document.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(document[error.start]):04x}"
    return None


def _txt(path: Path, shard: Shard) -> Iterator[str]:
    with path.open("rb") as file:
        file.seek(shard.start)
        text = _decode(file.read(shard.end - shard.start), path, shard.start)
    start = 0
    for blank in _BLANK_LINES.finditer(text):
        yield text[start : blank.start()]
        start = blank.end()
    yield text[start:]


def _jsonl(path: Path, shard: Shard) -> Iterator[str]:
    with path.open("rb") as file:
        position = shard.start
        file.seek(position)
        while position < shard.end and (line := file.readline()):
            if line.strip():
                document = _record(_decode(line, path, position), _line_at(path, position), shard.field)
                if document is not None:
                    yield document
            position += len(line)


def _record(line: str, where: Callable[[], str], field: str) -> str | None:
    """The text of a record; None where it is null, as in the other formats."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where()}: not a line of JSON ({error})") from None
    if isinstance(record, dict) and field in record and record[field] is None:
        return None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where()}: no text in field '{field}' (data.text_field); the record has {known}")
    text: str = record[field]
    if half := unpaired_surrogate(text):
        raise UserError(f"{where()}: {half} in field '{field}' is half of a surrogate pair, which is no character")
    return text


def _line_at(path: Path, position: int) -> Callable[[], str]:
    """Names the line at a position; counted only when an error needs it."""

    def name() -> str:
        lines, left = 1, position
        with path.open("rb") as file:
            while left and (block := file.read(min(left, 2**20))):
                lines += block.count(b"\n")
                left -= len(block)
        return f"{path}:{lines}"

    return name


def _parquet(path: Path, shard: Shard) -> Iterator[str]:
    import pyarrow

    table = _open_parquet(path)
    if shard.field not in table.schema_arrow.names:
        known = ", ".join(table.schema_arrow.names)
        raise UserError(f"{path}: no column '{shard.field}' (data.text_field); it has {known}")
    if not _is_text(table.schema_arrow, shard.field):
        kind = _type_of(table.schema_arrow, shard.field)
        texts = [name for name in table.schema_arrow.names if _is_text(table.schema_arrow, name)]
        raise UserError(
            f"{path}: column '{shard.field}' (data.text_field) holds {kind}, not text; "
            f"text is in {', '.join(texts) or 'no column'}"
        )
    groups = list(range(shard.start, shard.end))
    try:
        for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=[shard.field]):
            yield from (value for value in batch.column(0).to_pylist() if isinstance(value, str))
    except (UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: row groups {shard.start} to {shard.end - 1} cannot be read ({error})") from None


def _is_text(schema: pyarrow.Schema, column: str) -> bool:
    """Also for a column of nothing but nulls, which has no type of its own."""
    import pyarrow.types

    kind = _type_of(schema, column)
    tests = (
        pyarrow.types.is_string,
        pyarrow.types.is_large_string,
        pyarrow.types.is_string_view,
        pyarrow.types.is_null,
    )
    return any(test(kind) for test in tests)


def _type_of(schema: pyarrow.Schema, column: str) -> pyarrow.DataType:
    import pyarrow.types

    kind = schema.types[schema.names.index(column)]
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from None


def _row_groups(path: Path, shard_bytes: int) -> Iterator[tuple[int, int, int]]:
    if not path.stat().st_size:
        return
    table = _open_parquet(path).metadata
    start, size = 0, 0
    for group in range(table.num_row_groups):
        size += table.row_group(group).total_byte_size
        if size >= shard_bytes or group == table.num_row_groups - 1:
            yield start, group + 1, size
            start, size = group + 1, 0


def _byte_ranges(path: Path, shard_bytes: int) -> Iterator[tuple[int, int, int]]:
    end_of_document = _end_of_line if _kind(path) == ".jsonl" else _end_of_paragraph
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 0
        while start < size:
            end = end_of_document(file, start + shard_bytes, shard_bytes) if start + shard_bytes < size else size
            yield start, end, end - start
            start = end


def _end_of_line(file: BinaryIO, position: int, _most: int) -> int:
    file.seek(position)
    file.readline()
    return file.tell()


def _end_of_paragraph(file: BinaryIO, position: int, most: int) -> int:
    """Where the first blank line after `position` ends; without one within `most` bytes, where the first line does."""
    file.seek(position)
    text = file.read(most)
    if found := _BLANK_LINES_IN_BYTES.search(text):
        return position + found.end()
    return position + (text.find(b"\n") + 1 or len(text) - len(text.lstrip(_CONTINUATION_BYTES)))


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    try:
        text = data.decode("utf-8-sig" if not offset else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; "
            f"convert the file, for instance with iconv -t UTF-8"
        ) from None
    if text.count("\0") > _MOST_NULS * len(text):
        last = data[(offset + 1) % 2 :: 2].count(0) >= data[offset % 2 :: 2].count(0)  # of two bytes
        raise UserError(
            f"{path}: many characters are NUL, as in UTF-16; convert the file, for instance with "
            f"iconv -f UTF-16{'LE' if last else 'BE'} -t UTF-8"
        )
    return text


@contextlib.contextmanager
def _telling_of_loss(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"{path}: the file vanished while it was being prepared; "
            f"put it back and start again: finished parts are kept"
        ) from None
