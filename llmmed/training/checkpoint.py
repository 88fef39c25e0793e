"""Checkpoints: safetensors and JSON only, complete or absent, each file's checksum in a manifest.

`checkpoints/step_00000200/` holds `model.safetensors`, `optimizer.safetensors`, `state.json`, `manifest.json`.
Loading one runs no code, so one may come from a stranger.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmmed.files import flush, move_into_place, read_json, sha256_of_file, write_json

logger = logging.getLogger(__name__)

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_WRITING, _REPLACED = ".writing-", ".replaced-"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. `state` is plain JSON."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Writes the checkpoint of `step` into `folder` and removes all but the last `keep` and that of step `best`.

    Those of later steps go as well: they are damaged, or the run went on from an earlier one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder)
    target = folder / folder_name(step)
    replaced = folder / f"{_REPLACED}{target.name}"
    temporary = folder / f"{_WRITING}{os.getpid()}"
    temporary.mkdir()
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in model.items()}, temporary / "model.safetensors"
        )
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in optimizer.items()},
            temporary / "optimizer.safetensors",
        )
        write_json(temporary / "state.json", {"step": step, **state})
        for name in _FILES:
            os.chmod(temporary / name, temporary.stat().st_mode & 0o666)  # the user's umask; safetensors writes 0600
            flush(temporary / name)
        write_json(temporary / "manifest.json", {name: sha256_of_file(temporary / name) for name in _FILES})
        if target.exists():
            os.replace(target, replaced)  # at every moment there is one of the two
        move_into_place(temporary, target)
        shutil.rmtree(replaced, ignore_errors=True)
    except SafetensorError as error:
        raise OSError(f"the checkpoint of step {step} cannot be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    found = {step_of(path): path for path in sorted(folder.glob("step_*"))}
    earlier, later = ([s for s in found if (s > step) is after] for after in (False, True))
    for old in [*sorted(earlier)[:-keep], *later]:
        if old != best:
            shutil.rmtree(found[old], ignore_errors=True)
    return target


def set_aside(folder: Path, with_files: Sequence[str] = ()) -> Path | None:
    """Makes room for the checkpoints of a run that starts anew. Returns where old ones are now, if there were any, and
    with them the files of those names that lie beside the folder."""
    if not all_of(folder):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)
    for name in with_files:
        with contextlib.suppress(FileNotFoundError):
            (folder.parent / name).rename(aside / name)
    return aside


def folder_name(step: int) -> str:
    """Of the checkpoint of a step, inside `checkpoints/`."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Of a checkpoint, by the name of its folder."""
    return int(path.name.rpartition("_")[2])


def load(path: Path) -> Checkpoint:
    """One checkpoint, by its own folder; whoever calls has checked it."""
    state = read_json(path / "state.json")
    model, optimizer = (load_file(path / f"{name}.safetensors") for name in ("model", "optimizer"))
    return Checkpoint(state["step"], model, optimizer, state)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold, or None. Damaged ones are named in a warning and passed over."""
    found = all_of(folder)
    for index, path in enumerate(found):
        problem = damage(path)
        if problem is None:
            return path
        then = "using the one before it" if found[index + 1 :] else "there is no other"
        logger.warning("checkpoint %s is damaged (%s); %s", path, problem, then)
    return None


def all_of(folder: Path) -> list[Path]:
    """Every checkpoint, whole or damaged, the newest first. One that was being replaced counts where the new is not."""
    found = {step_of(path): path for pattern in (f"{_REPLACED}step_*", "step_*") for path in folder.glob(pattern)}
    return [found[step] for step in sorted(found, reverse=True)]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = read_json(path / "manifest.json")
        if missing := set(_FILES) - manifest.keys():
            return f"manifest.json does not name {', '.join(sorted(missing))}"
        for name, expected in manifest.items():
            if sha256_of_file(path / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _tidy(folder: Path) -> None:
    """Clears what a run left that was killed while it wrote."""
    for left in folder.glob(f"{_WRITING}*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob(f"{_REPLACED}*"):
        target = folder / left.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.replace(left, target)
