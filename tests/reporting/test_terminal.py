"""What a run prints: readable in 80 columns, plain where it is no terminal, without colour where that is asked for."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from llmmed import consoles
from llmmed.autotune.child import Progress
from llmmed.reporting import terminal
from llmmed.reporting.terminal import kernels_in_words, print_closing, telling_of_tuning
from tests.reporting.test_kernel_table import make_plan

COLOUR = re.compile(r"\x1b\[[\d;]*m")
SMOKE = ["experiment=smoke", "data=synthetic", "kernels=pytorch", "train.max_steps=4", "train.compile=eager"]
SUMMARY = {
    "final/train_loss": 2.71828, "final/val_loss": 2.83711, "best/val_loss": 2.7, "best/step": 550, "steps": 750,
    "tokens_per_second": 2_450_712.0, "mfu": 0.4012, "peak_memory_gib": 13.01, "training_time_seconds": 1234.5,
    "time_to_first_step_seconds": 178.0,
}  # fmt: skip


def test_the_closing_summary_has_units_and_no_line_is_folded() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_closing(SUMMARY, make_plan(), Path("outputs/2026-01-31/12-00-00"), console)
    assert [line.rstrip() for line in console.export_text().splitlines()] == [
        "loss     training 2.7183, validation 2.8371 nats a token (best 2.7000, step 550)",
        "speed    2,450,712 tokens/s, MFU 40.1%, peak memory 13.01 GiB",
        "time     1234.5 s of training; first step 178.0 s after the start",
        "kernels  triton for rms_norm; pytorch for the rest",
        "files    outputs/2026-01-31/12-00-00/",
    ]


def test_a_log_gets_a_line_about_tuning_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=140)
    with telling_of_tuning(console) as report:
        for second in range(25):
            now = 5.0 + second
            report(Progress("verify", "rms_norm", "triton", second, 30, 1.0 + second))
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        f"tuning: verifying rms_norm triton ({second} of 30 judged, {1 + second} s)" for second in (0, 10, 20)
    ]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"a": "pytorch", "b": "pytorch"}, "pytorch for every op"),
        (
            {"a": "triton", "b": "pytorch", "c": "cudnn", "d": "triton"},
            "triton for a, d; cudnn for c; pytorch for the rest",
        ),
        ({"a": "triton"}, "triton for a"),
    ],
)
def test_kernels_are_told_in_words(choice: Mapping[str, str], words: str) -> None:
    assert kernels_in_words(choice) == words


def on_a_terminal(command: list[str], folder: Path, **variables: str) -> str:
    """What a program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "80", **variables}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        parts = []
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:  # the other end was closed
            pass
        os.close(ours)
    text = b"".join(parts).decode()
    assert process.returncode == 0, text
    return text


@pytest.mark.slow
def test_a_terminal_has_colour_unless_it_is_not_wanted_and_a_pipe_never(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "scripts" / "train.py"), *SMOKE]
    coloured = on_a_terminal(command, tmp_path)
    plain = on_a_terminal(command, tmp_path, NO_COLOR="1")
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "\x1b[32m" in coloured or "\x1b[38;5;" in coloured
    assert not [code for code in COLOUR.findall(plain) if re.search(r"[\[;](3[0-7]|9[0-7]|38|48)[;m]", code)]
    assert "\x1b" not in piped.stdout
    assert piped.stderr == ""
    lines = piped.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.startswith("step ")]) <= 2 * 4
    for output in (coloured, plain, piped.stdout):  # header, choice, progress, summary
        for words in ("parameters", "Chosen: ", "tok/s", "nats a token", "tokens/s"):
            assert words in output, words


def test_in_a_file_lines_are_long_unless_their_width_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert consoles.output().width == 140
    monkeypatch.setenv("COLUMNS", "90")
    assert consoles.output().width == 90
