"""The user's own text: a `.txt`, `.jsonl` or `.parquet` file, or a folder of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from llmmed.config import DataConfig
from llmmed.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")
_BLANK_LINES = re.compile(r"\n\s*\n")


def files(config: DataConfig) -> list[Path]:
    """The files that `data.path` names, sorted. Raises `UserError` if there are none or all are empty."""
    if config.path is None:
        raise UserError(f"data=text needs data.path=<a {', '.join(SUFFIXES)} file, or a folder of them>")
    path = Path(config.path)
    if not path.exists():
        raise UserError(f"data.path={config.path}: there is no such file or folder")
    found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
    if not found or found[0].suffix not in SUFFIXES:
        raise UserError(f"data.path={config.path}: nothing to read; files end with {', '.join(SUFFIXES)}")
    if not any(p.stat().st_size for p in found):
        raise UserError(f"data.path={config.path}: {'the file is' if len(found) == 1 else 'all files are'} empty")
    return found


def documents(config: DataConfig) -> Iterator[str]:
    """Documents in the order of files and lines, without empty ones.

    A document is a record of a .jsonl or .parquet file, or a paragraph of a .txt file: what stands between blank lines.
    """
    for path in files(config):
        reader = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix]
        for document in reader(path, config.text_field):
            if document.strip():
                yield document.strip()


def _txt(path: Path, _field: str) -> Iterator[str]:
    yield from _BLANK_LINES.split(_decode(path.read_bytes(), path))


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        position = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _record(_decode(line, path, position), f"{path}:{number}", field)
            position += len(line)


def _record(line: str, where: str, field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no text in field '{field}' (data.text_field); the record has {known}")
    text: str = record[field]
    return text


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from None
    if field not in table.schema_arrow.names:
        known = ", ".join(table.schema_arrow.names)
        raise UserError(f"{path}: no column '{field}' (data.text_field); it has {known}")
    for batch in table.iter_batches(columns=[field]):
        yield from (value for value in batch.column(0).to_pylist() if isinstance(value, str))


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8-sig" if not offset else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; "
            f"convert the file, for instance with iconv -t UTF-8"
        ) from None
