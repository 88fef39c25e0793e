"""Processes that end with the one that started them, however that ends. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

from llmmed import collector


class Process(Protocol):
    """What is asked of a process that was started, however it was; `subprocess.Popen` has it."""

    @property
    def pid(self) -> int | None:
        """None as long as it is still to come."""

    @property
    def returncode(self) -> int:
        """Once it has ended."""

    @property
    def stdin(self) -> IO[bytes] | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Starter(Protocol):
    """`started_process`, or another way to have the same."""

    def __call__(
        self, module: str, arguments: list[str], log: Path, variables: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Process]: ...


@contextlib.contextmanager
def started_process(
    module: str,
    arguments: list[str],
    log: Path | None,
    variables: Mapping[str, str] | None = None,
    stdin: int = subprocess.PIPE,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs a module's `main`, in a group of its own, so that its compilers end with it, whatever happens
    here. Without a log it writes where this one writes."""
    process = spawn(module, arguments, log, variables, stdin)
    try:
        yield process
    finally:
        end(process)


def spawn(
    module: str,
    arguments: list[str],
    log: Path | None,
    variables: Mapping[str, str] | None,
    stdin: int = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """The process of `started_process`, for who ends it himself."""
    # The child finds what this process finds (`-P`: and nothing else), the implementations of other packages too.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    environment |= variables or {}
    with log.open("wb") if log is not None else contextlib.nullcontext() as output:
        return subprocess.Popen(
            command(module, arguments), stdin=stdin, stdout=output, stderr=output, env=environment,
            start_new_session=True,
        )  # fmt: skip


def command(module: str, arguments: list[str]) -> list[str]:
    """What runs a module's `main` in a new interpreter."""
    return [sys.executable, "-P", "-m", __name__, module, *arguments]


def end(*processes: Process) -> None:
    """Ends processes of `started_process` and all that they started, however far they are."""
    for process in processes:
        process.poll()  # it may have come in the meantime
        if process.stdin is not None:
            process.stdin.close()
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def end_with_parent(heard: Callable[[bytes], None] = lambda line: None) -> None:
    """The parent holds the other end of standard input. When that closes, this process group ends, compilers too.

    Until then `heard` is called, in another thread, with each line that the parent writes: at most `select.PIPE_BUF`
    bytes, and the next once the one before has been answered.
    """

    def wait() -> None:
        while line := os.read(sys.stdin.fileno(), select.PIPE_BUF):
            heard(line)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def how_it_ended(exit_code: int) -> str:
    """In words, e.g. "was killed by SIGSEGV"."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def last_lines(log: Path, most: int = 40) -> str:
    """The end of what a process wrote."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-most:])


def last_line(log: Path) -> str:
    """The last line of a process that is not empty; of a traceback it is the error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _main() -> None:
    with collector.still():
        module = importlib.import_module(sys.argv.pop(1))
    module.main()


if __name__ == "__main__":
    _main()
