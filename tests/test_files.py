"""A file that is written is whole, on the disk, and as private as the user wants."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from llmmed.files import write_atomically


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o022, 0o644), (0o002, 0o664)])
def test_a_file_is_as_private_as_the_umask_says(umask: int, mode: int, tmp_path: Path) -> None:
    path = tmp_path / "run" / "status.json"
    before = os.umask(umask)
    try:
        for content in ("first", "second"):  # another file in its place, too
            write_atomically(path, content)
            assert path.read_text() == content
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)
    assert list(path.parent.iterdir()) == [path]


def test_content_and_then_name_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, replace, seen = os.fsync, os.replace, list[str]()

    def flushed(handle: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        seen.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(tmp_path / "status.json", "{}")
    assert seen == ["file", "renamed", "folder"]


@pytest.mark.parametrize(
    ("error", "says"), [(errno.EINVAL, None), (errno.EACCES, None), (errno.EIO, "Input/output error")]
)
def test_where_folders_are_not_flushed_files_are_written(
    error: int, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    if says is None:
        write_atomically(tmp_path / "status.json", "{}")
    else:
        with pytest.raises(OSError, match=says):
            write_atomically(tmp_path / "status.json", "{}")
    assert (tmp_path / "status.json").read_text() == "{}"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "status.json", "before")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "status.json", "after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"status.json": "before"}
