"""Text cut into shards is the same text, and what it becomes depends neither on the shards nor on interruptions."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from llmmed import data
from llmmed.compose import compose
from llmmed.config import Config
from llmmed.data import parallel, preparation, shards, text, tokenizer, worker
from llmmed.errors import UserError

WORDS = ["heart", "Leber", "naïve", "ω-3", "心臓", "bile", "\u3000wide", "🫀", "x" * 30, "12 345", "don't"]


def config(path: Path, *overrides: str) -> Config:
    return compose(["data=text", f"data.path='{path}'", "tokenizer.vocab_size=300", "train.seq_len=16", *overrides])


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few documents, which are worth processes of their own."""
    monkeypatch.setattr(text.shards, "__defaults__", (400,))
    monkeypatch.setattr(parallel, "_SMALL", 1)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_shards_of_any_size_give_the_same_documents(suffix: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / f"notes{suffix}"
    blanks = ["\n\n", "\n \t\n", "\n\n\n\n", "\r\n\r\n", "\n\u3000\n"]
    documents = ["\n".join(sentence(rng) for _ in range(rng.randint(1, 3))) for _ in range(400)]
    if suffix == ".txt":
        path.write_bytes("".join(d + rng.choice(blanks) for d in documents).encode("utf-8-sig"))
    else:
        path.write_text("\n".join(json.dumps({"text": d}) for d in documents))
    source = config(path).data
    whole = [d for shard in text.shards(source) for d in text.read(shard)]
    assert whole == [d.strip() for d in documents]
    for size in range(1500, 6000, 700):
        parts = text.shards(source, size)
        assert len(parts) > 5
        assert [d for shard in parts for d in text.read(shard)] == whole


@pytest.mark.parametrize("line_end", ["\n", ""])
def test_a_paragraph_without_end_is_cut_and_nothing_is_lost(line_end: str, tmp_path: Path) -> None:
    whole = "".join(f"心臓{i}{line_end}" for i in range(500))
    (tmp_path / "long.txt").write_text(whole)
    parts = text.shards(config(tmp_path / "long.txt").data, 500)
    assert len(parts) > 3
    assert "".join(d + line_end for shard in parts for d in text.read(shard)) == whole


def test_row_groups_are_shards(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    documents = [f"Organ {i}." for i in range(100)]
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet", row_group_size=7)
    parts = text.shards(config(tmp_path / "a.parquet").data, 300)
    assert len(parts) > 2
    assert [d for shard in parts for d in text.read(shard)] == documents


def test_positions_of_bad_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    good = "\n\n".join(f"Paragraph {i}." for i in range(50)).encode()
    (tmp_path / "a.txt").write_bytes(good + b"\n\nbad \xff byte\n\n" + good)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' * 40 + b'{"text": "b\xffd"}\n')
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n' * 40 + b'{"text": "half \\ud83e"}\n')
    for name, position in (("a.txt", f"byte {len(good) + 6} "), ("a.jsonl", "byte 691 "), ("b.jsonl", "b.jsonl:41: ")):
        with pytest.raises(UserError, match=position):
            [list(text.read(shard)) for shard in text.shards(config(tmp_path / name).data, 100)]


def test_pieces_of_a_long_document_encode_like_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    document = " ".join(sentence(rng) for _ in range(400))
    trained = tokenizer.train_bpe([document], 400)
    monkeypatch.setattr(tokenizer, "_PIECE", 100)
    pieces = list(tokenizer.pieces(document))
    assert len(pieces) > 50
    assert "".join(pieces) == document
    assert [i for piece in pieces for i in trained.encode(piece).ids] == trained.encode(document).ids


@pytest.mark.usefixtures("small_shards")
def test_many_shards_in_processes_give_the_tokens_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(sentence(rng) for _ in range(300)))
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    many = data.prepare(config(path))
    train, validation = np.array(many.train), np.array(many.validation)
    assert len(text.shards(config(path).data)) > 10

    monkeypatch.setattr(text.shards, "__defaults__", (2**20,))
    monkeypatch.setenv("LLMMED_CACHE", str(tmp_path / "other"))
    one = data.prepare(config(path))
    assert np.array_equal(one.train, train)
    assert np.array_equal(one.validation, validation)
    assert one.fingerprint == many.fingerprint
    assert not list((tmp_path / "other" / "data").glob("*.work"))


@pytest.mark.usefixtures("small_shards")
def test_finished_shards_are_not_tokenised_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: 1)
    monkeypatch.setenv("LLMMED_CACHE", str(tmp_path / "cache"))
    rng = random.Random(3)
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(sentence(rng) for _ in range(300)))
    shards_in_all = len(text.shards(config(path).data))
    done: list[str] = []
    tokenise = shards.tokenise

    def failing(task: shards.Tokenise) -> None:
        if len(done) == 5:
            raise OSError(28, "No space left on device", str(task.output))
        tokenise(task)
        done.append(task.output.name)

    monkeypatch.setattr(preparation.shards, "tokenise", failing)
    with pytest.raises(UserError, match="disk with the prepared data is full"):
        data.prepare(config(path))
    scans = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.scan.npz")}
    assert len(scans) == shards_in_all

    again: list[str] = []
    monkeypatch.setattr(preparation.shards, "tokenise", lambda task: (tokenise(task), again.append(task.output.name)))
    monkeypatch.setattr(preparation.shards, "scan", lambda task: pytest.fail(f"{task} was scanned before"))
    told: list[str] = []
    data.prepare(config(path), told.append)
    assert not set(done) & set(again)
    assert len(done) + len(again) == shards_in_all
    assert any(f"5 of {shards_in_all}" in message for message in told)
    assert not any("training a tokenizer" in message for message in told)


PREPARE = """
import sys
from llmmed import data
from llmmed.compose import compose
from llmmed.data import parallel, text
text.shards.__defaults__ = (8_000,)
parallel._SMALL = 1
dataset = data.prepare(compose(["data=text", f"data.path='{sys.argv[1]}'", "tokenizer.vocab_size=600"]), print)
print(dataset.fingerprint)
"""


def test_killed_at_any_moment_it_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    path, cache = tmp_path / "notes.txt", tmp_path / "cache"
    path.write_text("\n\n".join(" ".join(sentence(rng) for _ in range(rng.randint(1, 20))) for _ in range(4000)))

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"LLMMED_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    for pattern, count in (("*.scan.npz", 10), ("[0-9]*.json", 25)):
        process = start()
        while process.poll() is None and len(list(cache.rglob(pattern))) < count:
            time.sleep(0.005)
        assert process.poll() is None, "the text is too short to be interrupted"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)  # its workers share its standard error: they have ended too
    last = start().communicate(timeout=100)[0]
    assert "were tokenised before" in last
    monkeypatch.setattr(text.shards, "__defaults__", (8_000,))
    assert last.splitlines()[-1] == data.prepare(config(path, "tokenizer.vocab_size=600")).fingerprint


def can_mount() -> bool:
    """Whether a file system of limited size can be made here, in a namespace of its own."""
    try:
        return subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces: unshare -Urm")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(f"Term {i}. The organ number {i * i} lies beside it." for i in range(20_000)))
    script = 'mount -t tmpfs -o size=1500k tmpfs disk && "$@"'
    done = subprocess.run(
        ["unshare", "-Urm", "bash", "-c", script, "bash", sys.executable, "-c", PREPARE, str(path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=os.environ | {"LLMMED_CACHE": str(tmp_path / "disk"), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "training a tokenizer" in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: the disk with the prepared data is full" in last
    assert "LLMMED_CACHE" in last


def test_a_file_that_vanishes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for number, path in enumerate(paths):
        path.write_text("\n\n".join(f"File {number}, paragraph {i} of it." for i in range(100)))
    scan = shards.scan

    def vanishing(task: shards.Scan) -> None:
        scan(task)
        paths[1].unlink(missing_ok=True)

    monkeypatch.setattr(preparation.shards, "scan", vanishing)
    with pytest.raises(UserError, match=r"b\.txt: the file vanished .* start again"):
        data.prepare(config(tmp_path))


def test_a_file_that_changes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of it." for i in range(100)))
    scan = shards.scan

    def changing(task: shards.Scan) -> None:
        scan(task)
        path.write_text(path.read_text().replace("\n\n", "\n", 1))

    monkeypatch.setattr(preparation.shards, "scan", changing)
    with pytest.raises(UserError, match=r"a\.txt: the file changed"):
        data.prepare(config(path))


def test_a_worker_that_is_killed_is_one_line() -> None:
    with worker.started(1) as one, pytest.raises(UserError, match=r"was killed, perhaps because the memory is full"):
        one.do(os._exit, 1)


def test_a_worker_hands_back_what_was_raised() -> None:
    with worker.started(1) as one:
        with pytest.raises(ZeroDivisionError):
            one.do(divmod_by_zero, 1)
        one.do(print, "printing is no answer")


def divmod_by_zero(number: int) -> None:
    divmod(number, 0)


def test_a_trained_tokenizer_sees_a_part_of_a_large_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.shards, "__defaults__", (1000,))
    paths = [tmp_path / f"{number}.txt" for number in range(10)]
    for number, path in enumerate(paths):
        path.write_text("\n\n".join(f"Only file{number}word is here {i}." for i in range(100)))
    dataset = data.prepare(config(tmp_path, "tokenizer.training_bytes=4000", "tokenizer.vocab_size=500"))
    assert dataset.tokenizer_file is not None
    vocabulary = Tokenizer.from_file(str(dataset.tokenizer_file)).get_vocab()
    assert 258 < len(vocabulary) <= 500


def test_max_documents_takes_the_first(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(f"Term {i}. Its text." for i in range(100)))
    dataset = data.prepare(config(path, "data.max_documents=40", "train.seq_len=8"))
    assert dataset.train_documents + dataset.validation_documents == 40
    assert dataset.tokenizer_file is not None
    decoded = Tokenizer.from_file(str(dataset.tokenizer_file)).decode([*dataset.train, *dataset.validation])
    assert "Term 39." in decoded
    assert "Term 40." not in decoded
