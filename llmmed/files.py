"""Files that survive a crash: atomic writes, hashes, and the user's cache folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import platformdirs

# What a file system says that flushes no folders, and the system of a folder that may be written and not read.
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


def cache_folder(name: str) -> Path:
    """A folder of the user's cache, created: `$LLMMED_CACHE/<name>` or the platform's place, e.g. `~/.cache/llmmed`."""
    root = os.environ.get("LLMMED_CACHE") or platformdirs.user_cache_dir("llmmed")
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes beside the target, flushes to disk, then renames: the file is whole or it is not there.

    Others may read it if the user's umask lets them.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        move_into_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move_into_place(source: Path, target: Path) -> None:
    """Renames a file or folder within its folder, and flushes that: once it returns, a power cut undoes nothing."""
    os.replace(source, target)
    try:
        flush(target.parent)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise


def flush(path: Path) -> None:
    """Has the system put a file's content, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically, indented, in the order given."""
    write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def try_lock(file: IO[Any] | int, *, shared: bool = False) -> bool:
    """Locks an open file until it is closed, if only by the end of this process. Returns whether nobody else has it.

    Raises `OSError` where the file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def finite(data: Any) -> Any:
    """Plain values with None, JSON's null, in place of infinite floats and NaN, which JSON does not have."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    return [finite(value) for value in data] if isinstance(data, list | tuple) else data


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole lines of a metrics file, values that were not finite as NaN; none if there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            break
        found.append({k: math.nan if v is None else v for k, v in entry.items()} if isinstance(entry, dict) else entry)
    return found


def sha256_of(parts: Iterable[bytes | str]) -> str:
    """A hash over parts that does not confuse ("ab", "c") with ("a", "bc")."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
