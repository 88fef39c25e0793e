"""Preparing at size: text in shards, scanned, split, tokenised on all cores, and put together.

Memory does not grow with the text but for 20 bytes a document. Each step leaves files that are whole or absent in a
working folder, so that a preparation that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmmed.config import Config, DataConfig, TokenizerConfig
from llmmed.data import biomed, parallel, shards, text, tokenizer
from llmmed.data.hub import HubSource
from llmmed.data.parallel import Report
from llmmed.data.split import Split, drop_leaks, split
from llmmed.data.spool import Listed, spool
from llmmed.errors import UserError
from llmmed.files import read_json, sha256_of_file, write_atomically, write_json

_COPIED_AT_ONCE = 2**24  # bytes
_ENDINGS = ", ".join(text.SUFFIXES)
_ROWS = 64  # of a table that products like


@dataclass(frozen=True)
class _Part:
    """A source on its way: its shards, where the scan of each is, and what becomes of its documents."""

    folder: Path
    shards: list[text.Shard]
    scans: list[Path]
    split: Split

    def parts(self, number: int) -> Path:
        """What becomes of the documents of a shard: a file made by `_write_parts`."""
        return self.folder / f"{number:05}.parts.npy"


@dataclass(frozen=True)
class _Training:
    """The training of a tokenizer as a task of its own."""

    config: TokenizerConfig
    shards: list[text.Shard]
    parts: list[Path]
    cuts: list[int]
    output: Path


def build(config: Config, work: Path, report: Report) -> None:
    """Fills `work/result` with `tokenizer.json`, the tokens of every source and `manifest.json`. Raises `UserError`.

    Args:
        config: Its data may be a mixture.
        work: Existing; what it has of an earlier attempt at the same is used.
        report: Is told what takes time.
    """
    result = work / "result"
    result.mkdir(exist_ok=True)
    if config.tokenizer.name == "hub":  # one that is not to be had is told before hours of text are read
        check_vocabulary(config, _tokenizer(config, [], work, result / "tokenizer.json", report)[0])
    sources = sources_of(config.data)
    parts = {key: _scanned(key, source, work, report) for key, source in sources.items()}
    if len(parts) > 1:
        drop_leaks([part.split for part in parts.values()], [part.scans for part in parts.values()])
    for part in parts.values():
        _write_parts(part)
    vocab_size, end_token = _tokenizer(config, list(parts.values()), work, result / "tokenizer.json", report)
    check_vocabulary(config, vocab_size)
    tokenizer.write_settings(result, str(tokenizer.read(result / "tokenizer.json").id_to_token(end_token)))
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    facts: dict[str, Any] = {"vocab_size": vocab_size, "end_token": end_token, "sources": {}}
    facts["tokenizer_sha256"] = sha256_of_file(result / "tokenizer.json")
    for key, part in parts.items():
        pieces = _tokenised(part, result / "tokenizer.json", end_token, dtype, _named("tokenising", key), report)
        (result / key).mkdir(exist_ok=True)
        facts["sources"][key] = {
            name: _assemble(pieces, name, dtype, result / key / f"{name}.npy") for name in shards.PARTS
        }
    write_json(result / "manifest.json", facts)


def sources_of(data: DataConfig) -> Mapping[str, DataConfig]:
    """The sources by the folder of their tokens: one, or those of a mixture."""
    return data.sources if data.name == "mixture" else {".": data}


def check_vocabulary(config: Config, vocab_size: int) -> None:
    if vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {vocab_size} tokens; "
            f"set tokenizer.vocab_size={vocab_size}, which the model's follows"
        )


def _scanned(key: str, source: DataConfig, work: Path, report: Report) -> _Part:
    folder = work / "sources" / key
    folder.mkdir(parents=True, exist_ok=True)
    its_shards = _shards(source, folder, report)
    scans = [folder / f"{number:05}.scan.npz" for number in range(len(its_shards))]
    tasks = [shards.Scan(shard, path) for shard, path in zip(its_shards, scans, strict=True) if not path.exists()]
    parallel.run(shards.scan, tasks, [task.shard.size for task in tasks], _named("reading", key), report)
    files = [shard.file for shard in its_shards]
    its_split = split(scans, source.validation_fraction, source.max_documents, files)
    if its_split.note:
        report(its_split.note)
    return _Part(folder, its_shards, scans, its_split)


def _shards(source: DataConfig, folder: Path, report: Report) -> list[text.Shard]:
    report(f"reading {source.name} documents")
    if source.name == "text":
        if others := text.left_out(source):
            report(f"data.path={source.path}: ignored are {others}; files that are read end with {_ENDINGS}")
        return text.shards(source)
    with parallel.progress("fetching" if source.name == "hub" else "reading", 0, report) as advance:
        if source.name == "hub":
            return spool(lambda: HubSource(source, report), folder, source.max_documents, advance)
        return spool(lambda: Listed(biomed.documents()), folder, None, advance)


def _write_parts(part: _Part) -> None:
    start = 0
    for number, scan in enumerate(part.scans):
        with np.load(scan) as arrays:
            end = start + len(arrays["length"])
        with part.parts(number).open("wb") as file:
            np.save(file, part.split.parts[start:end])
        start = end


def _tokenizer(config: Config, parts: list[_Part], work: Path, output: Path, report: Report) -> tuple[int, int]:
    """Leaves the tokenizer in `output`; returns the size of its vocabulary and its end token."""
    known = work / "tokenizer.json"  # written last
    if known.exists():
        facts = read_json(known)
        return facts["vocab_size"], facts["end_token"]
    if config.tokenizer.name == "hub":
        found, end_token = tokenizer.load(config.tokenizer, config.data.retries, report)
        write_atomically(output, found.to_str())
    else:
        size, training = _sample(config.tokenizer, parts, output)
        report(f"training a tokenizer of {config.tokenizer.vocab_size:,} tokens on up to {size / 1e6:,.1f} MB")
        parallel.run_alone(_train, training, size)
        found, end_token = tokenizer.read(output), tokenizer.END_ID
        count, wanted = tokenizer.vocabulary_size(found), config.tokenizer.vocab_size
        if count < wanted:
            report(
                f"the text gives no more than {count:,} of {wanted:,} tokens, and the model has rows for all of them; "
                f"these suffice: tokenizer.vocab_size={-(-count // _ROWS) * _ROWS}"
            )
    write_json(known, {"vocab_size": tokenizer.vocabulary_size(found), "end_token": end_token})
    return tokenizer.vocabulary_size(found), end_token


def _sample(config: TokenizerConfig, parts: list[_Part], output: Path) -> tuple[int, _Training]:
    """Shards taken evenly from all, with about as much text as the tokenizer is to be trained on."""
    everything = [(shard, part, number) for part in parts for number, shard in enumerate(part.shards)]
    total = sum(shard.size for shard, _, _ in everything)
    share = min(1.0, config.training_bytes / total) if config.training_bytes else 1.0
    count = max(1, round(share * len(everything)))
    sample = [everything[i * len(everything) // count] for i in range(count)]
    files = [part.parts(number) for _, part, number in sample]
    cuts = [part.split.cut for _, part, _ in sample]
    size = sum(shard.size for shard, _, _ in sample)
    return size, _Training(config, [shard for shard, _, _ in sample], files, cuts, output)


def _train(task: _Training) -> None:
    def documents() -> Iterator[str]:
        for shard, parts, cut in zip(task.shards, task.parts, task.cuts, strict=True):
            yield from (document for part, document in shards.parted(shard, parts, cut) if part == shards.TRAIN)

    trained = tokenizer.train_bpe(documents(), task.config.vocab_size)
    write_atomically(task.output, trained.to_str())


def _tokenised(part: _Part, tokenizer_file: Path, end_token: int, dtype: str, doing: str, report: Report) -> list[Path]:
    tasks = []
    outputs = [part.folder / f"{number:05}" for number in range(len(part.shards))]
    for number, (shard, output) in enumerate(zip(part.shards, outputs, strict=True)):
        if not output.with_suffix(".json").exists():
            tasks.append(
                shards.Tokenise(shard, output, part.parts(number), part.split.cut, tokenizer_file, end_token, dtype)
            )
    if tasks and len(tasks) < len(outputs):
        report(f"{len(outputs) - len(tasks)} of {len(outputs)} parts were tokenised before")
    parallel.run(shards.tokenise, tasks, [task.shard.size for task in tasks], doing, report)
    return outputs


def _assemble(pieces: list[Path], name: str, dtype: str, output: Path) -> dict[str, Any]:
    """One .npy file of all pieces, and what is in it."""
    counts = [read_json(piece.with_suffix(".json"))[name] for piece in pieces]
    facts: dict[str, Any] = {key: sum(count[key] for count in counts) for key in counts[0]}
    digest = hashlib.sha256()
    with output.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (facts["tokens"],)})
        for piece in pieces:
            with piece.with_suffix(f".{name}").open("rb") as tokens:
                while block := tokens.read(_COPIED_AT_ONCE):
                    digest.update(block)
                    file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return facts | {"sha256": digest.hexdigest()}


def _named(doing: str, key: str) -> str:
    return doing if key == "." else f"{doing} {key}"
