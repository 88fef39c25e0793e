"""What `scripts/verify.py` says of candidates that end the process in which they are tried."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmmed.autotune.verify import Verdict
from llmmed.errors import UserError
from llmmed.files import read_json, write_json
from llmmed.reporting import verdict_worker, verdicts
from llmmed.reporting.verdict_worker import RESTART


def test_one_that_ends_the_process_has_a_verdict_and_the_others_theirs(
    plant: Callable[..., None], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plant("right", "dies", "leaves", "wrong")
    assert verdicts.main(["op=rms_norm", "impl=dies,leaves,right,wrong"]) == 1
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    told = {line.split()[1]: line for line in lines if line.startswith("rms_norm ")}
    assert "crashed the process was killed by SIG" in told["dies"]
    assert "crashed the process ended with exit code 1 while it was verified" in told["leaves"]
    assert " wrong " in told["wrong"]
    assert " verified " in told["right"]


def test_one_that_damages_the_gpu_is_the_last_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = iter(["", "broken"])
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit

    monkeypatch.setattr(verdict_worker, "damage_of", lambda device: next(damaged) or None)
    monkeypatch.setattr(verdict_worker, "_verdict", lambda *args: Verdict("verified", "", 0.0, 0.0, 1))
    monkeypatch.setattr(verdict_worker, "end_with_parent", lambda: None)
    monkeypatch.setattr(verdict_worker.os, "_exit", end)
    job, answers = tmp_path / "job.json", tmp_path / "answers.jsonl"
    write_json(job, {"left": [["rms_norm", name, "float32"] for name in "abc"], "seeds": 1, "random": 0})
    monkeypatch.setattr(verdict_worker.sys, "argv", ["", str(job), str(answers)])
    with pytest.raises(SystemExit):
        verdict_worker.main()
    assert ended == [RESTART]
    first, second = answers.read_text().splitlines()
    assert '"verified"' in first
    assert '"crashed"' in second
    assert "left the GPU in error: broken" in second


def test_after_damage_the_others_are_tried_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[list[str]] = []

    @contextlib.contextmanager
    def process(module: str, arguments: list[str], log: None) -> Iterator[SimpleNamespace]:
        job, answers = map(Path, arguments)
        began.append([name for _, name, _ in read_json(job)["left"]])
        damaged = Verdict("crashed", f"{began[-1][0]} left the GPU in error", None, None, 0)
        answers.write_text(json.dumps(asdict(damaged)) + "\n")
        yield SimpleNamespace(poll=lambda: RESTART, returncode=RESTART)

    monkeypatch.setattr(verdicts, "started_process", process)
    request = verdicts.Request((("rms_norm", "a"), ("rms_norm", "b")), (torch.float32,), 1, named=True)
    reasons = [verdict.reason for _, _, _, verdict in verdicts.verdicts(request)]
    assert reasons == ["a left the GPU in error", "b left the GPU in error"]
    assert began == [["a", "b"], ["b"]]


def test_an_exit_code_like_a_restarts_is_none_without_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = SimpleNamespace(poll=lambda: RESTART, returncode=RESTART)
    monkeypatch.setattr(verdicts, "started_process", lambda *args: contextlib.nullcontext(ended))
    request = verdicts.Request((("rms_norm", "a"), ("rms_norm", "b")), (torch.float32,), 1, named=True)
    assert [verdict.status for _, _, _, verdict in verdicts.verdicts(request)] == ["crashed", "crashed"]


def test_random_shapes_are_asked_for_by_their_number() -> None:
    cpu = torch.device("cpu")
    assert verdicts.parse(["op=rms_norm", "random=100"], cpu).random == 100
    assert verdicts.parse(["op=rms_norm"], cpu).random == 0
    for value in ("-1", "many", "1.5"):
        with pytest.raises(UserError, match=f"random={value}: give a whole number, of shapes"):
            verdicts.parse([f"random={value}"], cpu)


def test_random_shapes_reach_the_process_that_tries_them(
    plant: Callable[..., None], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plant("wrong_if_one_short")
    asked = ["op=rms_norm", "impl=wrong_if_one_short"]
    assert verdicts.main(asked) == 0
    assert verdicts.main([*asked, "random=4"]) == 1
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    told = [line for line in lines if line.startswith("rms_norm ")]
    assert [" wrong " in line for line in told] == [False, True]
    assert "(a random x " in "".join(lines)


def test_a_line_that_is_not_whole_waits() -> None:
    file = io.BytesIO(b"one\ntw")
    assert list(verdicts._whole_lines(file)) == [b"one\n"]
    file.seek(0, io.SEEK_END)
    file.write(b"o\n")
    file.seek(4)
    assert list(verdicts._whole_lines(file)) == [b"two\n"]
