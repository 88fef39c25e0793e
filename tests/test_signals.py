"""SIGTERM at any moment: the run ends within seconds, its folder says so, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from llmmed import consoles, signals
from llmmed.run_folder import read_status
from tests.processes import Tagged

TRAIN = ["experiment=smoke", "train.max_steps=100000", "train.eval_every=0", "kernels.cache=none", "hydra.run.dir=run"]


def says(path: Path, words: str) -> bool:
    return path.exists() and words in path.read_text()


# Where it is when the signal comes, and the overrides that make it linger there.
STAGES: dict[str, tuple[list[str], Callable[[Tagged], bool]]] = {
    "importing torch": (
        ["data=synthetic", "kernels=pytorch"],
        lambda run: (run.folder / "run").exists(),
    ),
    "preparing data": (
        ["data=text", "data.path=text.txt", "kernels=pytorch"],
        lambda run: says(run.output, "training a tokenizer"),
    ),
    "tuning": (["data=synthetic", "kernels=auto"], lambda run: says(run.folder / "run" / "train.log", "tuning: ")),
    "compiling": (
        ["data=synthetic", "kernels=pytorch", "train.compile=compiled"],
        lambda run: bool(list(run.folder.glob("inductor/**/*.cpp"))),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_before_the_first_step(stage: str, tmp_path: Path, repository: Path) -> None:
    overrides, reached = STAGES[stage]
    (tmp_path / "text.txt").write_text("\n\n".join(f"{uuid.uuid4()} {uuid.uuid4()}" for _ in range(20_000)))
    run = Tagged(
        [sys.executable, str(repository / "scripts" / "train.py"), *TRAIN, *overrides], tmp_path,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"), LLMMED_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    run.wait_until(lambda: reached(run))
    assert run.ends(os.killpg if stage == "compiling" else os.kill) == 130  # a shell's signal reaches the group
    status = read_status(tmp_path / "run")
    assert status.state == "interrupted"
    assert "SIGTERM" in str(status.reason)
    told = run.output.read_text().splitlines()
    assert told[-1].startswith("interrupted: SIGTERM before the first step")
    assert "Traceback" not in run.output.read_text()
    assert not list((tmp_path / "cache").glob("**/.building-*"))


@pytest.mark.slow
def test_sigterm_to_a_sweep_ends_its_job(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "scripts" / "train.py"), "-m", *TRAIN[:-1], "data=synthetic",
               "kernels=pytorch", "seed=1,2", "hydra.sweep.dir=sweep"]  # fmt: skip
    run = Tagged(command, tmp_path)
    run.wait_until(lambda: bool(list(tmp_path.glob("sweep/*/metrics.jsonl"))))
    assert run.ends() == 130
    assert [read_status(folder).state for folder in tmp_path.glob("sweep/*/")].count("interrupted") == 1
    assert len(list(tmp_path.glob("sweep/*/metrics.jsonl"))) == 1


def python(code: str, folder: Path) -> Tagged:
    begin = "import time\nfrom pathlib import Path\nfrom llmmed.signals import Interrupted, StopRequest\n"
    run = Tagged([sys.executable, "-c", begin + code], folder, PYTHONPATH=os.pathsep.join(map(str, sys.path)))
    run.wait_until(lambda: says(run.output, "ready"))
    return run


def test_a_terminal_that_closes_ends_it_and_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    master, terminal = os.openpty()
    monkeypatch.setattr(signals, "_OUTPUTS", (terminal,))
    with signals.StopRequest() as stop:
        stop.waits = True
        os.close(master)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(terminal, b"told")
        os.kill(os.getpid(), signal.SIGHUP)
        assert os.write(terminal, b"told") == 4
        with pytest.raises(signals.Interrupted, match="SIGHUP"):
            stop.wait_no_more()
    os.close(terminal)


def unread() -> Console:
    """A console whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return consoles._Patient(file=os.fdopen(writer, "w"))


def test_a_reader_that_goes_ends_it_and_is_not_written_to() -> None:
    console = unread()
    with signals.StopRequest() as stop:
        stop.waits = True
        console.print("told")
        assert stop.name == signals.UNREAD
        console.print("told")
        console.file.write("told")
        console.file.flush()
        with pytest.raises(signals.Interrupted, match="nobody reads the output any more before the first step"):
            stop.wait_no_more()
    with signals.StopRequest() as stop:
        stop.waits = True
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.name == "SIGHUP"


def test_where_nothing_ends_in_order_a_reader_that_goes_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = unread()
    with (tmp_path / "stdout").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)  # which rich sends nowhere, whatever it wrote to
        with pytest.raises(SystemExit):
            console.print("told")
        os.dup2(file.fileno(), console.file.fileno())  # for what is flushed at the end


def test_a_line_is_told_if_somebody_reads_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    signals.say("told")
    assert capfd.readouterr().out == "told\n"
    gone = []
    monkeypatch.setattr(sys, "stdout", unread().file)
    monkeypatch.setattr(signals, "reader_is_gone", gone.append)
    signals.say("told")
    assert gone == [1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end


@pytest.mark.slow
def test_a_run_whose_reader_goes_keeps_what_it_has(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "scripts" / "train.py"), *TRAIN, "data=synthetic", "kernels=pytorch"]
    command.append("train.max_steps=2000")  # a line each 100
    environment = os.environ | {"LLMMED_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        next(line for line in run.stdout if line.startswith("step 100/"))
        run.stdout.close()
        assert run.wait(60) == signals.INTERRUPTED
    status = read_status(tmp_path / "run")
    assert status.state == "interrupted"
    assert str(status.reason).startswith("nobody reads the output any more after step ")
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            unread().print("told")
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert stop.name is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_library_that_does_not_listen_is_given_up(tmp_path: Path) -> None:
    code = """
import hashlib
with StopRequest(give_up=lambda name: print("given up:", name, flush=True), grace=0.5):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    run = python(code, tmp_path)
    assert run.ends() == 130
    assert says(run.output, "given up: SIGTERM")


def test_an_interruption_that_is_swallowed_comes_again(tmp_path: Path) -> None:
    code = """
class Finalized:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)
with StopRequest(give_up=print, grace=60):
    try:
        Finalized()
        print("swallowed", flush=True)
        time.sleep(60)
    except Interrupted as interruption:
        print("caught", interruption, flush=True)
"""
    run = python(code, tmp_path)
    assert run.ends() == 0
    assert says(run.output, "swallowed")
    assert says(run.output, "caught SIGTERM")


def test_ctrl_c_while_modules_are_loaded_leaves_no_traceback(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "hydra.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, repository / "scripts" / "train.py"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{repository}"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_while_it_waits_only_a_second_interrupt_ends_it(tmp_path: Path) -> None:
    code = """
import os, signal
with StopRequest(give_up=print, grace=0.1) as stop:
    stop.waits = True
    print("ready", flush=True)
    while stop.name is None:
        time.sleep(0.01)
    time.sleep(1)
    print("waited for", stop.name, flush=True)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except Interrupted as interruption:
        print("caught", interruption, flush=True)
"""
    run = python(code, tmp_path)
    assert run.ends() == 0
    assert says(run.output, "waited for SIGTERM\ncaught SIGTERM, then SIGINT")
