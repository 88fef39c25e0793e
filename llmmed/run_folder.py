"""The run folder: its status, what it ran on, who trains in it, and which unfinished run a new one continues."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from llmmed.compose import as_dict, from_dict, quoted
from llmmed.config import Config
from llmmed.errors import UserError
from llmmed.files import read_json, try_lock, write_atomically, write_json
from llmmed.machine import installed_version

logger = logging.getLogger(__name__)

State = Literal["none", "running", "finished", "failed", "interrupted"]


_LOCK = ".lock"
_held: dict[Path, int] = {}  # folders, and the open files whose locks end with this process


@dataclass(frozen=True)
class Status:
    """`status.json`. `none`: nothing has run in this folder yet."""

    state: State
    reason: str | None = None
    pid: int | None = None
    updated: str | None = None  # UTC, ISO 8601


def write_status(folder: Path, state: State, reason: str | None = None) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / "status.json", asdict(Status(state, reason, os.getpid(), now)))


def read_status(folder: Path) -> Status:
    """The folder's status; `none` where there is no file, or one that cannot be read."""
    try:
        return Status(**read_json(folder / "status.json"))
    except (OSError, ValueError, TypeError):
        return Status("none")


def hold(folder: Path) -> None:
    """Makes this process the only one that trains in a folder, until it ends, however it ends.

    Raises `UserError` if another one does.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not try_lock(descriptor):
            os.close(descriptor)
            raise UserError(
                f"{holder(folder) or 'another process'} is training in {shown(folder)}; wait for its end, or stop it"
            )
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s), so that nothing keeps a second process from training there; start none",
            shown(folder), error.strerror,
        )  # fmt: skip
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    _held[folder] = descriptor


def holder(folder: Path) -> str | None:
    """The other process that trains in a folder, as `process <pid> on <host>`, or None."""
    if folder.resolve() in _held:
        return None
    try:
        with (folder / _LOCK).open() as file:
            if not try_lock(file, shared=True):
                return file.read() or "another process"
    except OSError:  # nobody has ever trained there, or nothing can be locked there
        pass
    return None


def stated(overrides: Sequence[str]) -> Path | None:
    """The run folder that `hydra.run.dir` states as it is, without interpolation."""
    asked = [override for override in overrides if override.startswith("hydra.run.dir=")]
    if not asked:
        return None
    value = str(_parsed(asked[-1]))
    if not value:
        raise UserError("hydra.run.dir is empty; give it a value (is a variable of the shell not set?) or leave it out")
    return Path(value) if "${" not in value else None


def _parsed(override: str) -> Any:
    (found,) = OverridesParser.create().parse_overrides([override])  # `parse_override` names no key in its message
    return found.value()


def of_this_second(hydra: DictConfig) -> Path | None:
    """A new folder named after the second, as it is by default, or with -2, -3, ... behind that: runs that begin at
    once share none. None where the configuration names folders otherwise."""
    if "%S" not in str(OmegaConf.to_container(hydra.run, resolve=False)):
        return None
    try:
        named = Path(hydra.run.dir)
    except OmegaConfBaseException:  # it needs what is not known before Hydra has begun
        return None
    named.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = named if number == 1 else named.with_name(f"{named.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def remember(folder: Path) -> Callable[[], None]:
    """How the run in a folder was started; what is returned puts that back unless there is a new checkpoint.

    Hydra writes the overrides of a resume before it is known whether it can go on; one that failed must not decide
    those after it. A run that was finished is so still.
    """

    def checkpoints() -> set[str]:
        return {path.name for path in (folder / "checkpoints").glob("step_*")}

    files = [*(folder / ".hydra").glob("*.yaml")]
    if read_status(folder).state == "finished":
        files.append(folder / "status.json")
    contents, before = {path: path.read_bytes() for path in files}, checkpoints()

    def put_back() -> None:
        if checkpoints() == before:
            for path, content in contents.items():
                write_atomically(path, content)

    return put_back


def to_resume(config: Config, outputs: Path) -> Path | None:
    """The folder that `train.resume` names, or None to go on in the run's own folder.

    `latest` is the newest run under `outputs`, in a folder there or in one of those folders, of the same configuration
    that has not finished and that no other process is training; from then on this one holds it. Raises `UserError` if
    there is none, or if a folder is named that is no run folder.
    """
    resume = config.train.resume
    if resume is None or resume == "auto":
        return None
    if resume != "latest":
        folder = Path(resume)
        if not (folder / ".hydra" / "config.yaml").exists():
            raise UserError(f"train.resume={resume}: that is no run folder; give one, or auto, latest or null")
        return folder.absolute()
    stated = as_dict(config)
    wanted = _comparable(stated)
    folders = [path.parents[1] for depth in ("*", "*/*") for path in outputs.glob(f"{depth}/.hydra/config.yaml")]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        if read_status(folder).state in ("none", "finished"):  # none: a benchmark's
            continue
        if _comparable(_stored(folder, stated)) == wanted:
            with contextlib.suppress(UserError):
                hold(folder)
                return folder.absolute()
    raise UserError(f"train.resume=latest: no unfinished run of this configuration under {outputs}/; leave it out")


def _stored(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run, with paths as they are used; as it stands where this version cannot read it. A key
    that a group did not have yet has the value that is wanted."""
    values = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml"))
    assert isinstance(values, dict)
    found = {str(key): value for key, value in values.items()}
    for group, now in wanted.items():
        if isinstance(now, dict) and isinstance(before := found.get(group), dict):
            found[group] = {key: value for key, value in now.items() if key not in before} | before
    try:
        return as_dict(from_dict(found))
    except ValidationError:
        return found


def earlier_overrides(overrides: Sequence[str]) -> list[str]:
    """What the run that `train.resume=<folder>` names was started with, but for what is given again."""
    folder = _named_to_resume(overrides)
    if folder is None or not (file := folder / ".hydra" / "overrides.yaml").exists():
        return []
    again = {_key(override): override for override in overrides}

    def stays(earlier: str) -> bool:
        given = again.get(_key(earlier))
        # What adds a key, not an option of a group, stays before what only gives it another value.
        adds = earlier.startswith("+") and "@" not in earlier.partition("=")[0]
        return given is None or (adds and not given.startswith("+"))

    return [earlier for earlier in map(str, OmegaConf.load(file)) if stays(earlier)]


def started_elsewhere(overrides: Sequence[str], earlier: Sequence[str]) -> str | None:
    """Where the run that `train.resume=<folder>` names was started, if one of its own overrides is a path that leads
    somewhere from there and not from here."""
    folder = _named_to_resume(overrides)
    try:
        started = str(read_json(folder / "env.json")["working_folder"]) if folder is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    paths = [override.partition("=")[2].strip("'\"") for override in earlier]
    missing = started is not None and any(Path(started, path).exists() > Path(path).exists() for path in paths if path)
    return started if missing else None


def _named_to_resume(overrides: Sequence[str]) -> Path | None:
    asked = [override for override in overrides if override.startswith("train.resume=")]
    folder = str(_parsed(asked[-1])) if asked else "latest"
    return None if folder in ("auto", "latest", "None") else Path(folder)


def write_environment(folder: Path) -> None:
    """`env.json` of this start; that of an earlier one becomes `env.<n>.json`."""
    path = folder / "env.json"
    if path.exists():
        number = 1
        while (earlier := folder / f"env.{number}.json").exists():
            number += 1
        path.rename(earlier)
    write_json(path, describe_environment())


def describe_environment() -> dict[str, Any]:
    """What `env.json` holds: the command, versions, the source's commit. The hardware stands in `kernels.json`."""
    packages = ("torch", "triton", "hydra-core", "omegaconf", "wandb", "datasets", "tokenizers", "llmmed")
    return {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "working_folder": str(Path.cwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": {name: installed_version(name) for name in packages},
        "git": {
            "commit": _git("rev-parse", "HEAD"),
            "changed_files": (_git("status", "--porcelain") or "").splitlines(),
        },
    }


def resuming(folder: Path) -> str:
    """The override that goes on in a folder, as it is typed into a shell."""
    path = shown(folder)
    typed = f"train.resume={path}"
    if re.fullmatch(r"[\w./@+-]+", path, re.ASCII) and _parsed(typed) == path:  # 2, true and null are no text
        return typed
    return shlex.quote(f"train.resume={quoted(path)}")


def shown(folder: Path) -> str:
    """A path as people want to read it: relative where it lies below the working folder."""
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)


def _comparable(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what may differ between a run and its continuation.

    The micro-batch is how a step is cut up and not what it computes; with `auto` it is not known here either.
    """
    train = {key: value for key, value in values["train"].items() if key not in ("resume", "micro_batch_size")}
    return {**values, "train": train}


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _git(*arguments: str) -> str | None:
    """What git says of the package's own checkout, or None where it is none."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip()
