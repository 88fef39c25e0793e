"""What `scripts/verify.py` says: of candidates that end their process, and of what is known when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo

from llmmed.autotune.gpu_state import free_memory
from llmmed.autotune.verify import Verdict
from llmmed.errors import UserError
from llmmed.files import write_json
from llmmed.reporting import verdict_pool, verdict_worker, verdicts
from llmmed.reporting.verdict_pool import Task, VerdictPool
from tests.processes import Tagged

CPU = torch.device("cpu")
VERIFIED = Verdict("verified", "", 0.0, 0.0, 1)
WRONG = Verdict("wrong", f"{'gradient of logits in columns 625 to 749 ' * 4}(bfloat16)", 1.3e-5, 1.2, 1)
UNAVAILABLE = Verdict("unavailable", "it needs a GPU", None, None, 0)
LOST = Verdict("failed_to_compile", WRONG.reason, None, None, 0)


def rows(output: str) -> list[str]:
    lines = [" ".join(line.split()) for line in output.splitlines()]
    return [line for line in lines if line.startswith("rms_norm ")]


def test_one_that_ends_the_process_has_a_verdict_and_the_others_theirs(
    plant: Callable[..., None], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ones, in the order of the request, in however many processes."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(verdict_pool._ALONE, "cpu", 0.0)
    plant("right", "dies", "leaves", "wrong")
    told = []
    for workers in (1, 3):
        assert verdicts.main(["op=rms_norm", "impl=right,leaves,dies,wrong", f"workers={workers}"]) == 1
        told.append(rows(capfd.readouterr().out))
    assert told[0] == told[1]
    dies, leaves, right, wrong = told[0]
    assert "dies float32 crashed the process was killed by SIG" in dies
    assert "leaves float32 crashed the process ended with exit code 1 while it was verified" in leaves
    assert " right float32 verified " in right
    assert " wrong float32 wrong " in wrong


def test_what_is_known_is_shown_if_it_is_interrupted(
    plant: Callable[..., None], tmp_path: Path, repository: Path
) -> None:
    plant("eager_only", "hangs", "right")
    command = [sys.executable, str(repository / "scripts" / "verify.py"), "op=rms_norm", "impl=eager_only,hangs,right",
               "workers=1"]  # fmt: skip
    run = Tagged(command, tmp_path, PYTHONPATH=os.pathsep.join(map(str, sys.path)))
    run.wait_until(lambda: "verified" in run.output.read_text())
    assert run.ends(lambda process, _: os.killpg(process, signal.SIGINT)) == 130
    (known,) = rows(run.output.read_text())
    assert "eager_only float32 verified" in known
    told = run.output.read_text().splitlines()[-1]
    assert told.startswith(
        "interrupted by SIGINT: 1 of 3 decided, the rest was not verified; under way: rms_norm hangs "
    )
    assert "Traceback" not in run.output.read_text()


def test_those_that_came_before_their_turn_are_shown_too(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(pool: VerdictPool) -> list[tuple[int, Verdict]]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        return [(2, VERIFIED), (0, VERIFIED)]

    monkeypatch.setattr(VerdictPool, "look", look)
    assert verdicts.main(["op=rms_norm", "dtype=float32,bfloat16,float16", "impl=pytorch"]) == 130
    told = capfd.readouterr().out
    assert [row.split()[2] for row in rows(told)] == ["float32", "float16"]
    assert told.splitlines()[-1] == "interrupted by SIGINT: 2 of 3 decided, the rest was not verified"


def test_rows_come_in_the_order_of_the_request(capfd: pytest.CaptureFixture[str]) -> None:
    shown = verdicts._Rows(verdicts.consoles.output(), [Task("rms_norm", name, torch.float32) for name in "abc"])
    for place, names in ((1, ""), (0, "ab"), (2, "c")):
        shown.add(place, VERIFIED)
        assert "".join(row.split()[1] for row in rows(capfd.readouterr().out)) == names
    shown.add_held()
    assert not capfd.readouterr().out


def test_one_that_damages_the_gpu_is_the_last_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = iter(["", "broken"])
    answers: list[dict[str, dict[str, str]]] = []

    def hear(heard: Callable[[bytes], None]) -> None:
        for name in "abc":
            heard(json.dumps(["rms_norm", name, "float32"]).encode())

    monkeypatch.setattr(verdict_worker, "damage_of", lambda device: next(damaged) or None)
    monkeypatch.setattr(verdict_worker, "_verdict", lambda *args: VERIFIED)
    monkeypatch.setattr(verdict_worker, "end_with_parent", hear)
    monkeypatch.setattr(verdict_worker, "write_json", lambda path, answer: answers.append(answer))
    monkeypatch.setattr(verdict_worker.sys, "argv", ["", "answer.json", "1", "0"])
    verdict_worker.main()
    first, second = answers
    assert first == {"verdict": asdict(VERIFIED), "is_last": False}
    assert second["is_last"]
    assert second["verdict"]["status"] == "crashed"
    assert second["verdict"]["reason"] == "left the GPU in error: broken"


def test_after_damage_the_others_are_tried_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int | None] = []  # of the processes
    answer = tmp_path / "answer.json"

    def spawn(*how: object) -> SimpleNamespace:
        place = len(codes)
        codes.append(None)
        return SimpleNamespace(poll=lambda: codes[place], place=place, stdin=(tmp_path / "tasks").open("a"))

    monkeypatch.setattr(verdict_pool, "spawn", spawn)
    monkeypatch.setattr(verdict_pool, "end", lambda process: codes.__setitem__(process.place, -9))
    worker = verdict_pool._Worker(answer, 1, 0, {})
    for name, is_last in (("a", False), ("b", True), ("c", False)):
        worker.give(0, Task("rms_norm", name, torch.float32))
        assert worker.take_verdict(60.0) is None
        write_json(answer, {"verdict": asdict(VERIFIED), "is_last": is_last})
        assert worker.take_verdict(60.0) == VERIFIED
    assert codes == [-9, None]
    assert [json.loads(line)[1] for line in (tmp_path / "tasks").read_text().splitlines()] == ["a", "b", "c"]


def test_one_that_takes_too_long_is_timed_out_and_its_process_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, ended = 100.0, []
    process = SimpleNamespace(poll=lambda: None, stdin=(tmp_path / "tasks").open("a"))
    monkeypatch.setattr(verdict_pool, "spawn", lambda *how: process)
    monkeypatch.setattr(verdict_pool, "end", ended.append)
    monkeypatch.setattr(verdict_pool.time, "monotonic", lambda: now)
    worker = verdict_pool._Worker(tmp_path / "answer.json", 1, 0, {})
    worker.give(0, Task("rms_norm", "hangs", torch.float32))
    now = 160.0
    assert worker.take_verdict(60.0) is None
    now = 160.5
    verdict = worker.take_verdict(60.0)
    assert verdict is not None
    assert (verdict.status, ended, worker.task) == ("timed_out", [process], None)
    assert verdict.reason.startswith("took longer than 60 s")


def test_a_verdict_has_more_time_for_more_to_try() -> None:
    def seconds(*arguments: str) -> float:
        return verdicts.parse(["op=rms_norm", *arguments], CPU).seconds

    assert (seconds(), seconds("seeds=2"), seconds("random=10"), seconds("seeds=2", "seconds=7")) == (600, 1200, 800, 7)


def test_one_that_ends_the_process_after_its_verdict_takes_no_other_with_it(
    plant: Callable[..., None], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plant("dies_later", "slow_to_start")
    assert verdicts.main(["op=rms_norm", "impl=dies_later,slow_to_start", "workers=1"]) == 0
    found = {row.split()[1]: row.split()[3] for row in rows(capfd.readouterr().out)}
    assert found == {"dies_later": "verified", "slow_to_start": "verified"}


@pytest.mark.parametrize(
    ("cores", "gib", "workers"), [(1, None, 1), (6, None, 6), (64, None, 8), (16, 75.0, 8), (16, 11.0, 3), (4, 2.0, 1)]
)
def test_as_many_as_the_machine_has_room_for(
    cores: int, gib: float | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict_pool, "cores", lambda: cores)
    monkeypatch.setattr(verdict_pool, "free_memory", lambda device: gib)
    assert verdict_pool._sensible_workers(CPU) == workers


def test_room_is_what_others_have_left_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 80 * 2**30))
    assert free_memory(torch.device("cuda")) == 3.0
    assert free_memory(CPU) is None


def test_a_mistaken_number_is_told_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert verdicts.parse(["workers=4"], CPU).workers == 4
    assert verdicts.parse([], CPU).workers is None
    for value in ("0", "-1", "many", "1.5"):
        assert verdicts.main([f"workers={value}"]) == 1
        assert capfd.readouterr() == ("", f"error: workers={value}: give a whole number from 1 up\n")


def test_what_was_compiled_before_does_not_count() -> None:
    """A compiler that has had enough shapes of a function would fail those that come later to the same process."""
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        verdict_worker._verdict("rms_norm", "pytorch", torch.float32, CPU, 1, 0)
        assert torch._dynamo.config.recompile_limit >= 1024


def test_random_shapes_are_asked_for_by_their_number() -> None:
    assert verdicts.parse(["op=rms_norm", "random=100"], CPU).random == 100
    assert verdicts.parse(["op=rms_norm"], CPU).random == 0
    for value in ("-1", "many", "1.5"):
        with pytest.raises(UserError, match=f"random={value}: give a whole number, of shapes"):
            verdicts.parse([f"random={value}"], CPU)


def test_random_shapes_reach_the_process_that_tries_them(
    plant: Callable[..., None], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plant("wrong_if_one_short")
    asked = ["op=rms_norm", "impl=wrong_if_one_short"]
    assert verdicts.main(asked) == 0
    assert verdicts.main([*asked, "random=4"]) == 1
    told = rows(capfd.readouterr().out)
    assert [" wrong " in line for line in told] == [False, True]
    assert "(a random x " in told[1]


@pytest.mark.parametrize("width", [40, 70, 80, 200])
def test_nothing_is_cut_however_narrow_the_terminal(
    width: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reasons have 36 columns or more, and only rows that cannot be shorter are longer than a line."""
    monkeypatch.setenv("COLUMNS", str(width))
    tasks = [Task("linear_cross_entropy", name, torch.float32) for name in ("triton", "triton_recompute", "liger")]
    shown = verdicts._Rows(verdicts.consoles.output(), tasks)
    for place, verdict in enumerate((WRONG, LOST, UNAVAILABLE)):
        shown.add(place, verdict)
    lines = capfd.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) <= max(width, 70)
    told = " ".join(" ".join(lines).split())
    assert (
        f" triton float32 wrong 1.3e-05 1.2 {WRONG.reason} linear_cross_entropy"
        f" triton_recompute float32 failed to compile {WRONG.reason} linear_cross_entropy liger "
    ) in told
    assert told.endswith(" liger float32 unavailable it needs a GPU")
    reasons = [line for line in lines if line.startswith("    ")][1:]
    assert len(reasons) == {40: 13, 70: 7, 80: 7, 200: 2}[width]
    assert all(len(line) <= width for line in reasons)


def test_a_file_has_the_reasons_beside_the_rows(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    shown = verdicts._Rows(verdicts.consoles.output(), [Task("linear_cross_entropy", "triton", torch.bfloat16)])
    shown.add(0, UNAVAILABLE)
    *_, header, row = capfd.readouterr().out.splitlines()
    assert header.index("why") == row.index("it needs a GPU")


def test_the_last_line_names_what_makes_the_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task("rms_norm", name, torch.float32) for name in "abcdefg"]

    def told(*found: Verdict, named: bool = False) -> tuple[str, bool]:
        shown = verdicts._Rows(verdicts.consoles.output(), tasks)
        for place, verdict in reversed(list(enumerate(found))):
            shown.add(place, verdict)
        return shown.summary(named), shown.failed(named)

    assert told(VERIFIED, UNAVAILABLE, VERIFIED) == ("2 verified, 1 unavailable", False)
    assert told(VERIFIED, UNAVAILABLE, WRONG) == ("1 verified, 1 wrong (rms_norm c in float32), 1 unavailable", True)
    assert told(VERIFIED, named=True) == ("1 verified", False)
    unavailable = "1 asked for and unavailable (rms_norm b in float32)"
    assert told(VERIFIED, UNAVAILABLE, named=True) == (f"1 verified, {unavailable}", True)
    assert told(LOST, UNAVAILABLE, named=True) == (
        f"none verified, 1 failed to compile (rms_norm a in float32), {unavailable}",
        True,
    )
    many = "rms_norm a in float32, rms_norm b in float32, rms_norm c in float32 and 3 more"
    assert told(*6 * [WRONG], VERIFIED) == (f"1 verified, 6 wrong ({many})", True)


def test_it_ends_with_a_summary(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VerdictPool, "look", lambda pool: [(0, VERIFIED), (1, UNAVAILABLE)])
    is_done = iter((False, True))
    monkeypatch.setattr(VerdictPool, "is_done", property(lambda pool: next(is_done)))
    assert verdicts.main(["op=rms_norm", "impl=pytorch,triton"]) == 1
    last = capfd.readouterr().out.splitlines()[-1]
    assert last == "1 verified, 1 asked for and unavailable (rms_norm triton in float32)"


def test_errors_do_not_shrink_with_more_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest error and the most of what is allowed are rarely found in the same trial."""

    def found(*told: Verdict, seeds: int = 2) -> Verdict:
        monkeypatch.setattr(verdict_worker, "verify", lambda *args, seed, **kwargs: told[seed])
        monkeypatch.setattr(verdict_worker, "at_random", lambda *args: iter(told[seeds:]))
        return verdict_worker._verdict("rms_norm", "pytorch", torch.float32, CPU, seeds, 0)

    small, large = Verdict("verified", "", 1e-7, 0.5, 3), Verdict("verified", "", 4e-7, 0.1, 4)
    both = Verdict("verified", "", 4e-7, 0.5, 7)
    assert found(small, large) == found(large, small) == both
    assert found(large, small, seeds=1) == found(small, large, seeds=1) == both
    assert found(large, Verdict("wrong", "off", 2e-7, 9.0, 1)) == Verdict("wrong", "off", 4e-7, 9.0, 5)
    assert found(large, LOST, small) == LOST
