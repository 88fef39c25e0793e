"""Processes of tests: one with all its descendants, so that none is left behind unseen; one that starts at once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

FEW_SECONDS = 15  # on an idle machine two; tests may share theirs

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["llmmed.run", "torch._dynamo", "matplotlib.pyplot"])


def run_script(
    script: Path, arguments: Sequence[str], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What `python <script> <arguments>` does in a folder, without the seconds in which PyTorch is imported.

    The process is a fork of one that has imported it and done nothing else. Where the start of a process is part of
    what a test is about, it starts one of its own.
    """
    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name) / "stdout", Path(name) / "stderr"]
        variables = os.environ | environment
        process = _FORKS.Process(target=_run_script, args=([str(script), *arguments], folder, variables, outputs))
        process.start()
        process.join(250)
        process.kill()  # if it has not ended
        process.join()
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in outputs))


def _run_script(words: list[str], folder: Path, variables: Mapping[str, str], outputs: Sequence[Path]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv[:] = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


class Tagged:
    """A process whose descendants can be found, whatever they do: by a mark in their environment."""

    def __init__(self, command: list[str], folder: Path, **environment: str) -> None:
        self.mark, self.folder = f"LLMMED_TEST={uuid.uuid4()}", folder
        name, _, value = self.mark.partition("=")
        self.output = folder / "output.txt"
        # W&B leaves the address of its service there, and a run would take that of the tests for its own.
        inherited = {key: text for key, text in os.environ.items() if key != "WANDB_SERVICE"}
        self.process = subprocess.Popen(
            command, cwd=folder, env=inherited | environment | {name: value}, stdout=self.output.open("w"),
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 100
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def processes(self) -> dict[int, str]:
        """Those that run, and their command lines."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                    found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return found

    def all_end(self) -> None:
        deadline = time.monotonic() + FEW_SECONDS
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def ends(self, send: Callable[[int, int], None] = os.kill) -> int:
        """Sends SIGTERM, waits for the end of it and of all its descendants, and returns the exit code."""
        send(self.process.pid, signal.SIGTERM)
        code = self.process.wait(FEW_SECONDS)
        self.all_end()
        return code
