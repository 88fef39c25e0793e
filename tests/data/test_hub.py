"""The Hub's sources against a server on loopback: streamed and whole, with every fault, in processes of their own.

`datasets` reads the Hub's address when it is imported, hence the processes; each does several cases, to save time.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from hub_server import BROKEN, Hub, serve
from tokenizers import Tokenizer

from llmmed.data import network
from llmmed.data.tokenizer import END, end_of, train_bpe

DOCUMENTS = [f"Term {i}. The organ number {i} lies beside organ {i * 7 % 600}." for i in range(600)]
PREPARE = """
import json, sys, time
wait = time.sleep
time.sleep = lambda seconds: wait(min(seconds, 0.02))  # ours and the libraries' pauses are told, not made
from llmmed import data
from llmmed.compose import compose
from llmmed.data.hub import HubSource
from llmmed.errors import UserError
for name, overrides in json.load(sys.stdin).items():
    told = []
    try:
        if name == "source":
            source = HubSource(compose(["data=hub", *overrides]).data, told.append)
            print("ANSWER", json.dumps([name, {"documents": list(source.documents(None)), "told": told}]))
            continue
        dataset = data.prepare(compose(["data=hub", "train.seq_len=16", *overrides]), told.append)
        tokens = [*dataset.train.tolist(), *dataset.validation.tolist()]
        answer = {"tokens": tokens, "fingerprint": dataset.fingerprint,
                  "tokenizer": str(dataset.tokenizer_file), "end_token": dataset.end_token}
    except UserError as error:
        answer = {"error": str(error)}
    print("ANSWER", json.dumps([name, answer | {"told": told}]))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as server:
        yield server


def prepare(cases: dict[str, list[str]], home: Path, endpoint: str, **environment: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", PREPARE], input=json.dumps(cases), capture_output=True, text=True, timeout=120,
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "LLMMED_CACHE": str(home / "cache"),
                          "PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )  # fmt: skip
    answers = dict(json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    assert set(answers) == set(cases), done.stderr
    return answers


def jsonl(documents: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: d}) + "\n" for i, d in enumerate(documents)).encode()


def parquet(documents: list[str]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), buffer, row_group_size=50)
    return buffer.getvalue()


def decoded(answer: dict[str, Any]) -> list[str]:
    tokens = np.array(answer["tokens"])
    tokenizer = Tokenizer.from_file(answer["tokenizer"])
    ends = np.flatnonzero(tokens == answer["end_token"])
    return [tokenizer.decode(tokens[a:b]) for a, b in zip([0, *(ends[:-1] + 1)], ends, strict=True)]


def test_streamed_or_whole_the_tokens_are_the_same(hub: Hub, tmp_path: Path) -> None:
    trained = train_bpe(DOCUMENTS, 400)
    trained.add_special_tokens(["<stop>"])
    hub.repositories["some/tokenizer"] = {
        "tokenizer.json": trained.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": {"content": "<stop>"}}).encode(),
    }
    hub.repositories["some/terms"] = {
        "README.md": b"# Terms\n",
        "data/train-00000-of-00002.parquet": parquet(DOCUMENTS[:300]),
        "data/train-00001-of-00002.parquet": parquet(DOCUMENTS[300:]),
    }
    common = ["data.path=some/terms", "tokenizer=hub", "tokenizer.path=some/tokenizer", "tokenizer.vocab_size=401"]
    cases = {
        "streamed": [*common, "data.streaming=true"],
        "whole": [*common, "data.streaming=false"],
        "part": [*common, "data.streaming=true", "data.max_documents=100"],
        "small model": [*common[:-1], "tokenizer.vocab_size=300"],
    }
    answers = prepare(cases, tmp_path, hub.url)
    assert sorted(decoded(answers["streamed"])) == sorted(DOCUMENTS)
    assert answers["streamed"]["end_token"] == 400
    assert end_of(Path(answers["streamed"]["tokenizer"]).parent) == ("<stop>", 400)
    assert answers["whole"]["fingerprint"] == answers["streamed"]["fingerprint"]
    assert sorted(decoded(answers["part"])) == sorted(DOCUMENTS[:100])
    assert answers["streamed"]["told"]
    assert "set tokenizer.vocab_size=401" in answers["small model"]["error"]

    hub.requests.clear()
    assert prepare({"cached": cases["streamed"]}, tmp_path, hub.url)["cached"]["told"] == []
    assert hub.requests == []


def test_errors_that_pass_are_waited_for(hub: Hub, tmp_path: Path) -> None:
    for name, failures in {"meta": [500], "data": [BROKEN, 503], "whole": [503]}.items():
        hub.repositories[f"flaky/{name}"] = {f"{name}.jsonl": jsonl(DOCUMENTS)}
        hub.failures[f"/api/datasets/flaky/{name}" if name == "meta" else f"{name}.jsonl"] = failures
    hub.repositories["flaky/source"] = {"1.jsonl": jsonl(DOCUMENTS[:300]), "2.jsonl": jsonl(DOCUMENTS[300:])}
    hub.failures["2.jsonl"] = [503] * 8  # more than the library tries
    cases = {
        "source": ["data.path=flaky/source", "data.streaming=true"],
        "meta": ["data.path=flaky/meta", "data.streaming=true"],
        "data": ["data.path=flaky/data", "data.streaming=true"],
        "whole": ["data.path=flaky/whole", "data.streaming=false"],
    }
    common = ["data.retries=3", "tokenizer.vocab_size=400"]
    answers = prepare({name: [*overrides, *common] for name, overrides in cases.items()}, tmp_path, hub.url)
    source = answers.pop("source")
    assert source["documents"] == DOCUMENTS  # each once, also those before the error
    assert any("trying again in 1 s (1 of 3)" in line for line in source["told"])
    for name, answer in answers.items():
        assert "error" not in answer, (name, answer)
        assert sorted(decoded(answer)) == sorted(DOCUMENTS)
        assert not any(hub.failures.values())
    assert any("trying again in 1 s (1 of 3)" in line for line in answers["meta"]["told"])


def test_what_cannot_be_mended_by_waiting_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["some/notes"] = {"train.jsonl": jsonl(DOCUMENTS, field="body"), "README.md": b"# Notes\n"}
    hub.repositories["some/numbers"] = {"train.jsonl": b'{"text": 3}\n' * 50}
    hub.repositories["some/nothing"] = {"README.md": b"# Nothing\n"}
    hub.repositories["some/model"] = {"config.json": b"{}"}
    hub.repositories["always/broken"] = {"train.jsonl": jsonl(DOCUMENTS)}
    hub.failures["/api/datasets/always/broken"] = [500] * 100
    hub.gated.add("some/secret")
    (tmp_path / "folder").mkdir()
    cases = {
        "no such dataset": (["data.path=some/thing"], ["some/thing", "no such", "private"]),
        "gated": (["data.path=some/secret"], ["some/secret", "gated", "hf auth login"]),
        "missing field": (["data.path=some/notes"], ["no field 'text'", "data.text_field", "id, body"]),
        "missing field, streamed": (
            ["data.path=some/notes", "data.streaming=true"], ["no field 'text'", "data.text_field", "id, body"],
        ),
        "no text": (["data.path=some/numbers"], ["field 'text'", "int"]),
        "no files": (["data.path=some/nothing"], ["some/nothing", "data files"]),
        "no such split": (["data.path=some/notes", "data.split=dev"], ["dev", "train"]),
        "no such subset": (["data.path=some/notes", "data.subset=de"], ["de", "default"]),
        "empty folder": ([f"data.path='{tmp_path}/folder'"], ["folder", "data files"]),
        "no name": (["data.path='a b'"], ["a b"]),
        "server that stays broken": (["data.path=always/broken", "data.retries=1"], ["does not answer", "2 attempts"]),
        "no such tokenizer": (
            ["data.path=not/asked", "tokenizer=hub", "tokenizer.path=some/body"],
            ["tokenizer.path=some/body", "no such"],
        ),
        "no tokenizer.json": (
            ["data.path=some/notes", "data.text_field=body", "tokenizer=hub", "tokenizer.path=some/model"],
            ["tokenizer.path=some/model", "no tokenizer.json"],
        ),
    }  # fmt: skip
    answers = prepare({name: overrides for name, (overrides, _) in cases.items()}, tmp_path, hub.url)
    for name, (_, words) in cases.items():
        error = answers[name].get("error", "")
        assert "\n" not in error
        for word in words:
            assert word in error, (name, error)
        assert "not/asked" not in " ".join(hub.requests), "text is fetched for a tokenizer that there is not"
        assert name == "server that stays broken" or not any("trying again" in line for line in answers[name]["told"])


def test_without_a_network_it_says_so(tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound and not listening: nobody else can answer there
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        cases = {
            mode: ["data.path=some/terms", f"data.streaming={mode}", "data.retries=1"] for mode in ("true", "false")
        }
        answers = prepare(cases, tmp_path, endpoint)
        for answer in answers.values():
            assert "there is no network: 127.0.0.1:" in answer["error"]
            assert "Connection refused, 2 attempts" in answer["error"]
            assert any("trying again in 1 s (1 of 1)" in line for line in answer["told"])
        patient = prepare({"patient": ["data.path=some/terms", "data.retries=30"]}, tmp_path, endpoint)["patient"]
        assert [line.split("again in ")[1] for line in patient["told"] if "again in" in line] == [
            "1 s (1 of 4)", "2 s (2 of 4)", "4 s (3 of 4)", "8 s (4 of 4)"]  # fmt: skip
        switched_off = prepare({"off": cases["true"]}, tmp_path, endpoint, HF_HUB_OFFLINE="1")
        assert "HF_HUB_OFFLINE" in switched_off["off"]["error"]


def test_without_a_network_what_was_downloaded_before_is_used(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["some/kept"] = {"train.jsonl": jsonl(DOCUMENTS)}
    with serve() as gone:
        gone.repositories["some/kept"] = hub.repositories["some/kept"]
    case = {"kept": ["data.path=some/kept", "data.streaming=false", "tokenizer.vocab_size=400"]}
    before = prepare(case, tmp_path, hub.url)["kept"]
    shutil.rmtree(tmp_path / "cache")
    after = prepare(case, tmp_path, gone.url)["kept"]
    assert after["tokens"] == before["tokens"]
    assert any("it is taken from the local cache" in line for line in after["told"])


def test_a_network_that_comes_back_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.time, "sleep", lambda seconds: None)
    told: list[str] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        offline: list[bool] = []

        def action() -> str:
            offline.append(huggingface_hub.constants.HF_HUB_OFFLINE)
            if offline[-1] or len(offline) < 5:
                raise ConnectionError("gone")
            return "here"

        def report(line: str) -> None:
            told.append(line)
            if len(told) == 2:
                server.listen()

        assert network.fetch(action, "data.path=x", 6, report) == "here"
    assert offline == [True, True, False, False, False]
    assert "cannot be reached" in told[1]
    assert "gone; trying again in 8 s (4 of 6)" in told[3]


def test_a_local_folder_needs_no_server(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_bytes(jsonl(DOCUMENTS))
    cases = {
        mode: [f"data.path='{tmp_path}/folder'", f"data.streaming={mode}", "tokenizer.vocab_size=400"]
        for mode in ("true", "false")
    }
    for answer in prepare(cases, tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1").values():
        assert sorted(decoded(answer)) == sorted(DOCUMENTS)
        assert answer["end_token"] == Tokenizer.from_file(answer["tokenizer"]).token_to_id(END)
