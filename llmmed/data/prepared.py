"""The data of a run: packed tokens, prepared once and cached under a fingerprint of all that decides them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmmed.config import Config, DataConfig
from llmmed.data import biomed, text
from llmmed.data.batches import Batches
from llmmed.data.mixture import Mixture
from llmmed.data.parallel import Report
from llmmed.data.preparation import build, check_vocabulary, sources_of
from llmmed.data.shards import PARTS
from llmmed.errors import UserError
from llmmed.files import cache_folder, read_json, sha256_of, sha256_of_file, try_lock, write_json

if TYPE_CHECKING:
    import numpy.typing as npt

    Tokens = npt.NDArray[np.integer]

_VERSION = 3  # of what is stored: whoever changes which tokens come out of a text raises it
_FACTS = ("documents", "bytes", "tokens", "sha256")  # that the manifest has of each part of a source
_DAYS_KEPT = 30  # what a preparation that was given up has left behind
_HASHED_AT_ONCE = 2**24  # tokens
_SYNTHETIC_TOKENS = 2**23
_VERIFIED = "verified.json"  # size and time of the files whose hashes were found right


@dataclass(frozen=True)
class Dataset:
    """Packed tokens, documents separated by `end_token`.

    `fingerprint` is a hash of the tokens themselves, of synthetic ones of what they are drawn with.
    """

    name: str
    train: Tokens | Mixture
    validation: Tokens | Mixture
    tokenizer_file: Path | None
    end_token: int
    bytes_per_token: float | None  # of the validation text, for bits per byte
    train_documents: int
    validation_documents: int
    fingerprint: str


def check(config: Config) -> None:
    """What can be told about the sources without preparing them. Raises `UserError`."""
    if config.tokenizer.name == "hub" and config.tokenizer.path is None:
        raise UserError("tokenizer=hub needs tokenizer.path=<a repository's name, or a folder with its tokenizer.json>")
    if config.data.name == "mixture":
        _check_mixture(config.data)
    for key, source in sources_of(config.data).items():
        try:
            _check_source(source, config.train.seq_len)
        except UserError as error:
            if config.data.name != "mixture":
                raise
            place = f"data.sources.{key}"
            told = str(error).replace(f"data={source.name} needs", f"{place} needs")
            raise UserError(re.sub(r"\bdata\.path(?=[=:])", f"{place}.path", told)) from None


def prepare(config: Config, report: Report = lambda message: None) -> Dataset:
    """The data of a run, from the cache or prepared now. `report` is told what takes time. Raises `UserError`."""
    dataset = _prepared(config, report)
    for part, tokens in (("training", dataset.train), ("validation", dataset.validation)):
        name = f"the {part} part of data={dataset.name}"
        Batches(tokens, config.train.seq_len, 1, seed=0, shuffle=False, name=name)  # whether there is one window
    return dataset


def _prepared(config: Config, report: Report) -> Dataset:
    if config.data.name == "synthetic":
        return _synthetic(config)
    recipe = _recipe(config)
    folder = cache_folder("data") / recipe[:32]
    dataset = _open(folder, config)
    if dataset is not None:
        return dataset
    with _alone(folder.with_suffix(".lock"), report):
        dataset = _open(folder, config)  # another run may have prepared it meanwhile
        if dataset is not None:
            return dataset
        if folder.exists():
            report(f"the prepared data in {folder} is damaged; preparing it again")
            shutil.rmtree(folder, ignore_errors=True)
        work = folder.with_suffix(".work")
        _clear_abandoned(folder.parent, work, report)
        work.mkdir(exist_ok=True)
        try:
            build(config, work, report)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the disk with the prepared data is full ({work}); make room, or set LLMMED_CACHE to a folder on "
                f"another disk, and start again: finished parts are kept"
            ) from None
        if _recipe(config) != recipe:
            raise UserError(f"data.path={config.data.path}: files changed while they were being prepared; start again")
        os.replace(work / "result", folder)
        shutil.rmtree(work, ignore_errors=True)
    dataset = _open(folder, config)
    if dataset is None:
        raise UserError(f"the prepared data cannot be read back from {folder}; is the disk full?")
    return dataset


def _check_source(source: DataConfig, seq_len: int) -> None:
    if source.name == "biomed" and (missing := biomed.missing_package()):
        raise UserError(f"data=biomed needs the package {missing}; pip install 'llmmed[biomed]', or use data=text")
    if source.name == "hub" and source.path is None:
        raise UserError("data=hub needs data.path=<a dataset's name on the Hugging Face Hub, or a folder>")
    if source.name == "text" and not text.holds(source, seq_len):
        size = sum(path.stat().st_size for path in text.files(source))  # raises where there is nothing at all
        raise UserError(
            f"train.seq_len={seq_len} is longer than the data: data.path={source.path} has {size} bytes, "
            f"which are fewer tokens still; use a shorter train.seq_len or more text"
        )


def _check_mixture(data: DataConfig) -> None:
    if not data.sources or set(data.sources) != set(data.weights):
        raise UserError(
            f"data=mixture needs a weight for each source: data.sources has {', '.join(data.sources) or 'nothing'}, "
            f"data.weights has {', '.join(data.weights) or 'nothing'}"
        )
    for key, source in data.sources.items():
        if source.name in ("mixture", "synthetic"):
            raise UserError(f"data.sources.{key}: {source.name} cannot be part of a mixture; use biomed, text or hub")
    Mixture({key: np.zeros(0, dtype=np.uint16) for key in data.sources}, data.weights)


def _recipe(config: Config) -> str:
    """A hash of all that decides what comes out."""
    facts = {
        "version": _VERSION,
        "sources": {key: _source_facts(source) for key, source in sources_of(config.data).items()},
        "tokenizer": [asdict(config.tokenizer), _stats(config.tokenizer.path)],
    }
    return sha256_of([json.dumps(facts, sort_keys=True)])


def _source_facts(source: DataConfig) -> dict[str, object]:
    facts = asdict(source)
    for key in ("retries", "path", "weights"):  # none of them changes a token; files are told by what they are
        del facts[key]
    if source.name == "biomed":
        return facts | {"package": biomed.version()}
    if source.name == "text":
        return facts | {"files": [_stat(path) for path in text.files(source)]}
    return facts | {"path": source.path, "files": _stats(source.path)}


def _stats(path: str | None) -> list[list[str | int]]:
    """The files of a local folder; nothing for the name of something on the Hub."""
    if path is None or not Path(path).is_dir():
        return []
    return [_stat(found) for found in sorted(Path(path).rglob("*")) if found.is_file()]


def _stat(path: Path) -> list[str | int]:
    stat = path.stat()
    return [str(path.absolute()), stat.st_size, stat.st_mtime_ns]


@contextlib.contextmanager
def _alone(lock: Path, report: Report) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however that ends."""
    with lock.open("w") as file:
        os.utime(lock)
        if not try_lock(file):
            report("another run is preparing the same data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(folder: Path, config: Config) -> Dataset | None:
    """The prepared data, memory-mapped, or None if it is not there or not what its manifest says."""
    try:
        facts = read_json(folder / "manifest.json")
        vocab_size, end_token = int(facts["vocab_size"]), int(facts["end_token"])
        sources = {
            key: {name: {fact: source[name][fact] for fact in _FACTS} for name in PARTS}
            for key, source in facts["sources"].items()
        }
        if set(sources) != set(sources_of(config.data)):
            return None
        tokens = {
            name: {key: np.load(folder / key / f"{name}.npy", mmap_mode="r") for key in sources} for name in PARTS
        }
        if any(len(array) != sources[key][name]["tokens"] for name in PARTS for key, array in tokens[name].items()):
            return None
        if not _is_whole(folder, facts["tokenizer_sha256"], sources, tokens):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    check_vocabulary(config, vocab_size)
    weights = config.data.weights if config.data.name == "mixture" else {".": 1.0}
    mixtures = {name: Mixture(tokens[name], weights) for name in PARTS}
    held_out = {key: source["validation"] for key, source in sources.items()}
    hashes = [source[name]["sha256"] for source in sources.values() for name in PARTS]
    return Dataset(
        name=config.data.path or "hub" if config.data.name == "hub" else config.data.name,
        train=_plain(mixtures["train"]),
        validation=_plain(mixtures["validation"]),
        tokenizer_file=folder / "tokenizer.json",
        end_token=end_token,
        bytes_per_token=mixtures["validation"].mean({k: v["bytes"] / v["tokens"] for k, v in held_out.items()})
        if all(part["tokens"] for part in held_out.values())
        else None,
        train_documents=sum(source["train"]["documents"] for source in sources.values()),
        validation_documents=sum(part["documents"] for part in held_out.values()),
        fingerprint=sha256_of(hashes + ([json.dumps(weights)] if len(sources) > 1 else [])),
    )


def _is_whole(
    folder: Path, tokenizer_sha256: str, sources: Mapping[str, Any], tokens: Mapping[str, Mapping[str, Tokens]]
) -> bool:
    """Whether the files have the hashes of the manifest: read once, and again if their size or time changed."""
    seen = {str(path.relative_to(folder)): _stat(path)[1:] for path in sorted(folder.rglob("*.npy"))}
    seen["tokenizer.json"] = _stat(folder / "tokenizer.json")[1:]
    record = folder / _VERIFIED
    with contextlib.suppress(FileNotFoundError, ValueError):
        if read_json(record) == seen:
            return True
    if sha256_of_file(folder / "tokenizer.json") != tokenizer_sha256:
        return False
    for name, arrays in tokens.items():
        for key, array in arrays.items():
            digest = hashlib.sha256()
            for start in range(0, len(array), _HASHED_AT_ONCE):
                digest.update(array[start : start + _HASHED_AT_ONCE].tobytes())
            if digest.hexdigest() != sources[key][name]["sha256"]:
                return False
    with contextlib.suppress(OSError):  # a cache of somebody else's, that can only be read, is verified every time
        write_json(record, seen)
    return True


def _clear_abandoned(root: Path, ours: Path, report: Report) -> None:
    """Removes what preparations left that nobody has gone on with for long, for instance of text that has changed."""
    for work in sorted(root.glob("*.work")):
        lock = work.with_suffix(".lock")  # touched by every attempt
        if work == ours or (lock.exists() and time.time() - lock.stat().st_mtime < _DAYS_KEPT * 86_400):
            continue
        with lock.open("a") as file:
            if try_lock(file):
                report(f"removing {work}: a preparation that was not gone on with for {_DAYS_KEPT} days")
                shutil.rmtree(work, ignore_errors=True)


def _plain(mixture: Mixture) -> Tokens | Mixture:
    """The tokens themselves where there is only one source that is no part of a mixture."""
    return mixture.parts.get(".", mixture)


def _synthetic(config: Config) -> Dataset:
    """Uniform random tokens; nothing to cache, they are drawn in a fraction of a second."""
    size = max(_SYNTHETIC_TOKENS, 4 * (config.train.seq_len + 1))
    vocab_size = config.model.vocab_size
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    tokens = np.random.default_rng(config.seed).integers(0, vocab_size, size, dtype=dtype)
    held_out = max(config.train.seq_len + 1, round(size * min(config.data.validation_fraction, 0.5)))
    return Dataset(
        name="synthetic",
        train=tokens[held_out:],
        validation=tokens[:held_out],
        tokenizer_file=None,
        end_token=0,
        bytes_per_token=None,
        train_documents=0,
        validation_documents=0,
        fingerprint=sha256_of(["synthetic", str(config.seed), str(size), str(vocab_size)]),
    )
