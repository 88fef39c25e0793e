"""Processes that end with the one that started them, however that ends. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from llmmed import collector


@contextlib.contextmanager
def started_process(
    module: str, arguments: list[str], log: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs a module's `main`, in a group of its own, so that its compilers end with it, whatever happens
    here."""
    # The child finds what this process finds (`-P`: and nothing else), the implementations of other packages too.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    environment |= variables or {}
    command = [sys.executable, "-P", "-m", __name__, module, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process of `started_process` and all that it started, however far they are."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def end_with_parent() -> None:
    """The parent holds the other end of standard input. When that closes, this process group ends, compilers too."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
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
