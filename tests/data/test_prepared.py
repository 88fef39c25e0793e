"""Preparing data: nothing leaks into validation, a second run takes the cache, what is damaged is made again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from llmmed import data
from llmmed.compose import compose
from llmmed.config import Config
from llmmed.data import biomed, prepared, shards, text
from llmmed.errors import UserError
from llmmed.files import cache_folder, sha256_of


def text_config(path: Path, *overrides: str) -> Config:
    return compose(["data=text", f"data.path='{path}'", "tokenizer.vocab_size=400", "train.seq_len=16", *overrides])


def write_documents(path: Path, count: int = 400) -> list[str]:
    documents = [f"Term {i}. The organ number {i} lies beside organ {i * 7 % count}." for i in range(count)]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return documents


def decode(dataset: data.Dataset, tokens: np.ndarray) -> list[str]:
    assert dataset.tokenizer_file is not None
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_file))
    ends = np.flatnonzero(tokens == dataset.end_token)
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def test_every_document_is_in_one_part_and_only_there(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "terms.txt")
    dataset = data.prepare(text_config(tmp_path / "terms.txt", "data.validation_fraction=0.1"))
    train, validation = decode(dataset, dataset.train), decode(dataset, dataset.validation)
    assert sorted(train + validation) == sorted(documents)
    assert not set(train) & set(validation)
    assert (dataset.train_documents, dataset.validation_documents) == (360, 40)


def test_text_cannot_forge_the_end_of_a_document(tmp_path: Path) -> None:
    forged = [f"Term {i}. It says <|endoftext|> in its middle." for i in range(100)]
    (tmp_path / "terms.txt").write_text("\n\n".join(forged))
    dataset = data.prepare(text_config(tmp_path / "terms.txt"))
    assert int((dataset.train == dataset.end_token).sum()) == dataset.train_documents
    assert sorted(decode(dataset, dataset.train) + decode(dataset, dataset.validation)) == sorted(forged)


def test_terms_of_one_name_stay_together(tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("\n\n".join(f"Term {i // 4}. Version {i % 4}." for i in range(400)))
    dataset = data.prepare(text_config(tmp_path / "terms.txt", "data.validation_fraction=0.1"))
    train, validation = decode(dataset, dataset.train), decode(dataset, dataset.validation)
    assert validation
    assert not {shards.head(d) for d in train} & {shards.head(d) for d in validation}


def test_a_single_document_is_split_by_position(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("\n".join(f"Line {i} of a long story." for i in range(200)))
    dataset = data.prepare(text_config(tmp_path / "one.txt", "data.validation_fraction=0.2"))
    train, validation = decode(dataset, dataset.train)[0], decode(dataset, dataset.validation)[0]
    assert train.startswith("Line 0 ")
    assert validation.rstrip().endswith("Line 199 of a long story.")
    assert validation.startswith("Line 1")
    assert len(validation) < len(train)


def test_a_note_of_several_paragraphs_is_in_one_part(tmp_path: Path) -> None:
    for name in range(40):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"Part {i} of note {name}." for i in range(6)))
    dataset = data.prepare(text_config(tmp_path))
    train, validation = ({d.split()[-1] for d in decode(dataset, part)} for part in (dataset.train, dataset.validation))
    assert len(validation) == 2
    assert not train & validation


@pytest.mark.parametrize(
    ("document", "position", "expected"),
    [
        ("line\n" * 1000, 4750, 4755),
        ("So. " * 1000 + "\n", 3800, 3804),  # its one line end is its last character
        ("word " * 1000, 4750, 4755),
        ("心" * 1000, 950, 950),
        ("ab", 1, 1),
    ],
)
def test_a_text_is_cut_at_the_end_of_a_line_a_sentence_or_a_word(document: str, position: int, expected: int) -> None:
    assert shards.cut(document, position) == (document[:expected], document[expected:])


def test_the_second_run_takes_the_cache_and_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    write_documents(tmp_path / "terms.txt")
    config = text_config(tmp_path / "terms.txt", "seed=11")
    first = data.prepare(config)
    train = first.train.copy()
    started = time.perf_counter()
    second = data.prepare(config, lambda message: pytest.fail(f"it is not taken from the cache: {message}"))
    assert time.perf_counter() - started < 1
    assert np.array_equal(train, second.train)

    assert first.tokenizer_file is not None
    folder = first.tokenizer_file.parent
    (folder / "train.npy").unlink()
    np.save(folder / "train.npy", np.zeros(3, dtype=np.uint16))
    told: list[str] = []
    third = data.prepare(config, told.append)
    assert any("damaged" in message for message in told)
    assert np.array_equal(train, third.train)


def test_tokens_that_rotted_are_made_again_and_whole_ones_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "terms.txt")
    config = text_config(tmp_path / "terms.txt", "data.validation_fraction=0.07")
    first = data.prepare(config)
    train = first.train.copy()
    assert first.tokenizer_file is not None
    file = first.tokenizer_file.with_name("train.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    told: list[str] = []
    again = data.prepare(config, told.append)
    assert any("damaged" in message for message in told)
    assert np.array_equal(train, again.train)

    file.touch()
    data.prepare(config, lambda message: pytest.fail(f"only its time has changed: {message}"))
    monkeypatch.setattr(prepared, "sha256_of_file", lambda path: pytest.fail("it was verified before"))
    data.prepare(config)


@pytest.mark.parametrize("change", [{"sources": {}}, {"tokenizer_sha256": "0"}, {"end_token": None}])
def test_a_manifest_that_lacks_something_is_damage(change: dict[str, object], tmp_path: Path) -> None:
    write_documents(tmp_path / "terms.txt", 100)
    config = text_config(tmp_path / "terms.txt")
    first = data.prepare(config)
    assert first.tokenizer_file is not None
    manifest = first.tokenizer_file.with_name("manifest.json")
    facts = json.loads(manifest.read_text()) | change
    first.tokenizer_file.with_name("verified.json").unlink()
    manifest.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
    told: list[str] = []
    assert data.prepare(config, told.append).end_token == first.end_token
    assert any("damaged" in message for message in told)


def test_what_was_given_up_long_ago_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMMED_CACHE", str(tmp_path / "cache"))
    write_documents(tmp_path / "terms.txt", 100)
    long_ago = time.time() - 40 * 86_400
    for name, touched in (("old", long_ago), ("used", long_ago), ("new", time.time())):
        (cache_folder("data") / f"{name}.work").mkdir()
        (cache_folder("data") / f"{name}.lock").touch()
        os.utime(cache_folder("data") / f"{name}.lock", (touched, touched))
    with (cache_folder("data") / "used.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        data.prepare(text_config(tmp_path / "terms.txt"))
    assert {path.stem for path in cache_folder("data").glob("*.work")} == {"used", "new"}


def test_what_comes_out_of_a_text_belongs_to_the_version(tmp_path: Path) -> None:
    """If this fails, other documents are trained on: raise `_VERSION`, so that no cache of before is taken."""
    for name in range(30):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"Part {i} of note {name}. It ends." for i in range(4)))
    (tmp_path / "more.jsonl").write_text("".join(f'{{"text": "Term {i // 2}. Version {i}."}}\n' for i in range(200)))
    dataset = data.prepare(text_config(tmp_path))
    documents = [decode(dataset, dataset.train), decode(dataset, dataset.validation)]
    assert (prepared._VERSION, sha256_of([json.dumps(documents)])[:16]) == (3, "5dc438313105d75e")


def test_two_runs_at_once_prepare_once(tmp_path: Path) -> None:
    write_documents(tmp_path / "terms.txt")
    config = text_config(tmp_path / "terms.txt", "seed=12")
    told: list[str] = []
    waits = threading.Event()

    def tell(message: str) -> None:
        told.append(message)
        waits.set()

    with ThreadPoolExecutor(1) as pool, ExitStack() as first_run:
        lock = cache_folder("data") / f"{prepared._recipe(config)[:32]}.lock"
        first_run.enter_context(prepared._alone(lock, tell))
        second_run = pool.submit(data.prepare, config, tell)
        assert waits.wait(10)
        assert told == ["another run is preparing the same data; waiting for it"]
        assert not second_run.done()
        first_run.close()
        assert len(second_run.result(60).train) > 0


def test_changed_text_is_prepared_anew(tmp_path: Path) -> None:
    write_documents(tmp_path / "terms.txt")
    config = text_config(tmp_path / "terms.txt")
    before = data.prepare(config)
    write_documents(tmp_path / "terms.txt", count=500)
    assert data.prepare(config).fingerprint != before.fingerprint


def test_folders_of_all_formats_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("first paragraph\n\nsecond paragraph\n\n\n")
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "third"}) + '\n\n{"text": null}\n' + json.dumps({"text": "fourth"}) + "\n"
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fifth", None, "sixth"]}), tmp_path / "c.parquet")
    source = text_config(tmp_path).data
    found = [document for shard in text.shards(source) for document in text.read(shard)]
    assert found == ["first paragraph", "second paragraph", "third", "fourth", "fifth", "sixth"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"fine\nbad \xff byte", ["a.txt", "byte 9", "0xff"]),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', ["a.jsonl:2", "'text'", "body"]),
        ("a.jsonl", b'{"text": "x"\n', ["a.jsonl:1", "JSON"]),
        ("a.parquet", b"no parquet", ["a.parquet", "Parquet"]),
        ("a.jsonl", b"[" * 200_000, ["a.jsonl:1", "not a line of JSON"]),
        ("a.txt", b" \n \n\n   \n" * 20, ["no text"]),
        ("a.txt", "Term. An organ.\n\n".encode("utf-16-le") * 20, ["a.txt", "iconv -f UTF-16LE"]),
        ("a.txt", "Язык есть речь.\n\n".encode("utf-16-be") * 20, ["a.txt", "iconv -f UTF-16BE"]),
        ("a.txt.gz", b"\x1f\x8b", ["nothing to read", "1 .gz", "unpack"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        data.prepare(text_config(tmp_path / name, "train.seq_len=4"))
    for word in words:
        assert word in str(caught.value)


def test_folders_that_are_linked_to_are_read_once(tmp_path: Path) -> None:
    notes, elsewhere = tmp_path / "notes", tmp_path / "elsewhere"
    for folder in (notes, elsewhere / "deep"):
        folder.mkdir(parents=True)
    (notes / "a.txt").write_text("here")
    (elsewhere / "deep" / "b.txt").write_text("there")
    (notes / "link").symlink_to(elsewhere)
    (elsewhere / "deep" / "around").symlink_to(notes)
    source = text_config(notes, "train.seq_len=4").data
    assert [document for shard in text.shards(source) for document in text.read(shard)] == ["here", "there"]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_folder_beside_a_link_to_it_has_its_own_name(
    reverse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run1").mkdir()
    (tmp_path / "run1" / "a.txt").write_text("one")
    (tmp_path / "latest").symlink_to(tmp_path / "run1")
    scan = os.scandir

    class InOrder(ExitStack):
        def __init__(self, path: str) -> None:
            super().__init__()
            with scan(path) as entries:
                self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=reverse))

        def __next__(self) -> os.DirEntry[str]:
            return next(self.entries)

    monkeypatch.setattr(os, "scandir", InOrder)
    assert [str(path.relative_to(tmp_path)) for path in text._below(tmp_path)] == ["run1/a.txt"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path / "a.txt")
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refuse(path: str | Path) -> os._ScandirContext[str]:  # chmod does not stop root
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"data.path: the folder .*/locked cannot be read \(Permission denied\)"):
        data.prepare(text_config(tmp_path))


def test_a_text_with_few_tokens_is_told(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.txt", 40)
    told: list[str] = []
    config = text_config(tmp_path, "tokenizer.vocab_size=4000")
    tokens = Tokenizer.from_file(str(data.prepare(config, told.append).tokenizer_file)).get_vocab_size()
    assert tokens < 4000
    enough = next(message for message in told if f"no more than {tokens} of 4,000 tokens" in message)
    assert tokens <= int(enough.rpartition("tokenizer.vocab_size=")[2]) < tokens + 64


def test_files_that_are_not_read_are_told(tmp_path: Path) -> None:
    write_documents(tmp_path / "TERMS.TXT")
    for name in ("a.txt.gz", "b.md", "c.MD", "LICENSE"):
        (tmp_path / name).write_text("x")
    told: list[str] = []
    assert data.prepare(text_config(tmp_path), told.append).train_documents > 300
    assert any("ignored are 1 .gz, 2 .md, 1 without an ending;" in message for message in told)


def test_a_column_that_is_no_text_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        "text": [1, 2],
        "raw": [b"a", b"b"],
        "body": ["a", "b"],
        "kind": pyarrow.array(["x", "y"]).dictionary_encode(),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    for field, kind in (("text", "int64"), ("raw", "binary")):
        with pytest.raises(UserError, match=f"'{field}' .* holds {kind}, not text; text is in body, kind"):
            data.prepare(text_config(tmp_path / "a.parquet", f"data.text_field={field}"))
    source = text_config(tmp_path / "a.parquet", "data.text_field=kind").data
    assert [d for shard in text.shards(source) for d in text.read(shard)] == ["x", "y"]


def test_a_folder_is_not_listed_to_see_that_it_has_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in range(3):
        write_documents(tmp_path / f"{name}.txt", 20)
    monkeypatch.setattr(text, "files", lambda config: pytest.fail("every file was listed"))
    text_config(tmp_path)
    with pytest.raises(pytest.fail.Exception):
        text_config(tmp_path, "train.seq_len=100000")


def test_synthetic_needs_no_text_and_uses_the_whole_vocabulary() -> None:
    config = compose(["data=synthetic", "model.vocab_size=1000"])
    dataset, again = data.prepare(config), data.prepare(replace(config, seed=1))
    assert dataset.train.max() == 999
    assert not np.array_equal(dataset.train[:100], again.train[:100])


def test_biomed_reads_well() -> None:
    documents = biomed.documents()
    assert 25_000 < len(documents) < 40_000
    assert len(set(documents)) == len(documents)
    heart = next(d for d in documents if d.startswith("Heart. "))
    assert "pump" in heart or "muscular" in heart
    assert "Broader terms: " in heart
    for document in documents:
        assert not any(mark in document for mark in ("[http", "http://", "obsolete", "  "))
