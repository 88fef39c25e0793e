"""From a source to packed tokens: split by document, tokenised, cached under a fingerprint of all that decides them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmmed.config import Config
from llmmed.data import biomed, text
from llmmed.errors import UserError
from llmmed.files import cache_folder, read_json, sha256_of, write_json

if TYPE_CHECKING:
    import numpy.typing as npt

    Tokens = npt.NDArray[np.integer]

_VERSION = 1  # of what is stored; a change of the preparation raises it
_SYNTHETIC_TOKENS = 2**23


@dataclass(frozen=True)
class Dataset:
    """Packed tokens, documents separated by `end_token`.

    `fingerprint` is a hash of the tokens themselves; `from_cache` says that nothing had to be prepared.
    """

    name: str
    train: Tokens
    validation: Tokens
    vocab_size: int  # ids are below it
    tokenizer_file: Path | None
    end_token: int
    bytes_per_token: float | None  # of the validation text, for bits per byte
    train_documents: int
    validation_documents: int
    fingerprint: str
    from_cache: bool


def check(config: Config) -> None:
    """What can be told about the source without preparing it. Raises `UserError`."""
    source, seq_len = config.data, config.train.seq_len
    if source.name == "biomed" and (missing := biomed.missing_package()):
        raise UserError(f"data=biomed needs the package {missing}; pip install 'llmmed[biomed]', or use data=text")
    if source.name == "text":
        size = sum(path.stat().st_size for path in text.files(source))
        if size < seq_len and not any(path.suffix == ".parquet" for path in text.files(source)):
            raise UserError(
                f"train.seq_len={seq_len} is longer than the data: data.path={source.path} has {size} bytes, "
                f"which are fewer tokens still; use a shorter train.seq_len or more text"
            )


def prepare(config: Config, report: Callable[[str], None] = lambda message: None) -> Dataset:
    """The data of a run, from the cache or prepared now. `report` is told what takes time. Raises `UserError`."""
    if config.data.name == "synthetic":
        return _synthetic(config)
    folder = cache_folder("data") / _recipe(config)[:32]
    dataset = _open(folder, config, from_cache=True)
    if dataset is None:
        if folder.exists():
            report(f"the prepared data in {folder} is damaged; preparing it again")
            shutil.rmtree(folder, ignore_errors=True)
        _build(config, folder, report)
        dataset = _open(folder, config, from_cache=False)
        if dataset is None:
            raise UserError(f"the prepared data cannot be read back from {folder}; is the disk full?")
    return dataset


def _recipe(config: Config) -> str:
    """A hash of all that decides what comes out."""
    source, tokenizer = config.data, config.tokenizer
    facts: dict[str, Any] = {
        "version": _VERSION,
        "source": source.name,
        "validation_fraction": source.validation_fraction,
        "tokenizer": [tokenizer.name, tokenizer.vocab_size],
    }
    if source.name == "biomed":
        facts["package"] = biomed.version()
    else:
        stats = [(path, path.stat()) for path in text.files(source)]
        facts["files"] = [[str(path.absolute()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        facts["field"] = source.text_field
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return sha256_of([json.dumps(facts, sort_keys=True), *code])


def _build(config: Config, folder: Path, report: Callable[[str], None]) -> None:
    """Prepares in a folder beside the target and renames it: it is whole, or it is not there."""
    from llmmed.data.tokenizer import END_ID, train_bpe

    report(f"reading {config.data.name} documents")
    source = biomed.documents() if config.data.name == "biomed" else list(dict.fromkeys(text.documents(config.data)))
    train, validation = _split(source, config.data.validation_fraction)
    report(f"training a tokenizer of {config.tokenizer.vocab_size:,} tokens on {len(train):,} documents")
    tokenizer = train_bpe(train, config.tokenizer.vocab_size)
    report("tokenising")
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
        facts: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "end_token": END_ID}
        for name, documents in (("train", train), ("validation", validation)):
            tokens = _pack(tokenizer, documents, END_ID, dtype)
            np.save(temporary / f"{name}.npy", tokens)
            facts[name] = {
                "documents": len(documents),
                "bytes": sum(len(document.encode()) for document in documents),
                "tokens": len(tokens),
                "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
            }
        tokenizer.save(str(temporary / "tokenizer.json"))
        write_json(temporary / "manifest.json", facts)
        try:
            os.replace(temporary, folder)
        except OSError:  # another run was faster; what it made is the same
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pack(tokenizer: Any, documents: Sequence[str], end_token: int, dtype: Any) -> Tokens:
    ids: list[npt.NDArray[np.integer]] = []
    for start in range(0, len(documents), 2048):
        for encoding in tokenizer.encode_batch(list(documents[start : start + 2048]), add_special_tokens=False):
            ids.append(np.array([*encoding.ids, end_token], dtype=dtype))
    return np.concatenate(ids) if ids else np.zeros(0, dtype=dtype)


def _split(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """By a hash of what a document begins with, so that terms of the same name stay together.

    Text too short to be split by documents is split by position, at the end of a line or sentence where there is one.
    """
    if not documents:
        raise UserError("the data has no text; every document is empty")
    ranked = sorted(range(len(documents)), key=lambda i: hashlib.sha256(_head(documents[i]).encode()).digest())
    chosen = set(ranked[: round(fraction * len(documents))])
    if not chosen or len(chosen) == len(documents):
        return _split_by_position(documents, fraction)
    heads = {_head(documents[i]) for i in chosen}
    train = [d for d in documents if _head(d) not in heads]
    validation = [d for d in documents if _head(d) in heads]
    return (train, validation) if train else _split_by_position(documents, fraction)


def _split_by_position(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    whole = "\n\n".join(documents)
    cut = min(max(1, round((1 - fraction) * len(whole))), len(whole) - 1)
    for end in ("\n", ". ", " "):
        found = whole.find(end, cut)
        if 0 < found + len(end) < len(whole):
            cut = found + len(end)
            break
    return [whole[:cut]], [whole[cut:]]


def _head(document: str) -> str:
    return document.partition(". ")[0].casefold()


def _open(folder: Path, config: Config, *, from_cache: bool) -> Dataset | None:
    """The prepared data, memory-mapped, or None if it is not there or not what its manifest says."""
    try:
        facts = read_json(folder / "manifest.json")
        parts = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "validation")}
        if any(len(tokens) != facts[name]["tokens"] for name, tokens in parts.items()):
            return None
        if not (folder / "tokenizer.json").exists():
            return None
    except (OSError, ValueError, KeyError):
        return None
    if facts["vocab_size"] > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {facts['vocab_size']} tokens"
        )
    validation = facts["validation"]
    return Dataset(
        name=config.data.name,
        train=parts["train"],
        validation=parts["validation"],
        vocab_size=facts["vocab_size"],
        tokenizer_file=folder / "tokenizer.json",
        end_token=facts["end_token"],
        bytes_per_token=validation["bytes"] / validation["tokens"] if validation["tokens"] else None,
        train_documents=facts["train"]["documents"],
        validation_documents=validation["documents"],
        fingerprint=sha256_of([facts["train"]["sha256"], validation["sha256"]]),
        from_cache=from_cache,
    )


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
        vocab_size=vocab_size,
        tokenizer_file=None,
        end_token=0,
        bytes_per_token=None,
        train_documents=0,
        validation_documents=0,
        fingerprint=sha256_of(["synthetic", str(config.seed), str(size), str(vocab_size)]),
        from_cache=False,
    )
