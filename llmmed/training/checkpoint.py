"""Checkpoints: safetensors and JSON only, complete or absent, each file's checksum in a manifest.

`checkpoints/step_00000200/` holds `model.safetensors`, `optimizer.safetensors`, `state.json`, `manifest.json`.
Loading one runs no code, so one may come from a stranger.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmmed.files import read_json, sha256_of_file, write_json

logger = logging.getLogger(__name__)


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
    """Writes the checkpoint of `step` into `folder` and removes all but the last `keep` and that of step `best`."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".writing-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    target = folder / folder_name(step)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in model.items()}, temporary / "model.safetensors"
        )
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in optimizer.items()},
            temporary / "optimizer.safetensors",
        )
        write_json(temporary / "state.json", {"step": step, **state})
        names = ("model.safetensors", "optimizer.safetensors", "state.json")
        for name in names:
            _flush(temporary / name)
        write_json(temporary / "manifest.json", {name: sha256_of_file(temporary / name) for name in names})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _flush(folder)
    except SafetensorError as error:
        raise OSError(f"the checkpoint of step {step} cannot be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in sorted(folder.glob("step_*"))[:-keep]:
        if best is None or old.name != folder_name(best):
            shutil.rmtree(old, ignore_errors=True)
    return target


def folder_name(step: int) -> str:
    """Of the checkpoint of a step, inside `checkpoints/`."""
    return f"step_{step:08d}"


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold, or None."""
    path = latest(folder)
    return None if path is None else load(path)


def load(path: Path) -> Checkpoint:
    """One checkpoint, by its own folder; whoever calls has checked it."""
    state = read_json(path / "state.json")
    model, optimizer = (load_file(path / f"{name}.safetensors") for name in ("model", "optimizer"))
    return Checkpoint(state["step"], model, optimizer, state)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold, or None. Damaged ones are named in a warning and passed over."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("checkpoint %s is damaged (%s); using the one before it", path, problem)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = read_json(path / "manifest.json")
        if missing := {"model.safetensors", "optimizer.safetensors", "state.json"} - manifest.keys():
            return f"manifest.json does not name {', '.join(sorted(missing))}"
        for name, expected in manifest.items():
            if sha256_of_file(path / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
