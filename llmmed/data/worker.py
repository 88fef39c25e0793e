"""A process that does tasks of `parallel`, one at a time: pickled on standard input, answered on standard output.

It is not one of `multiprocessing`, whose processes import the script that started them, and with it whatever that
imports. When the parent ends, however it ends, the input ends, and so does this process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from llmmed.errors import UserError

Task = TypeVar("Task")


class Worker:
    """Such a process, seen from the parent."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def do(self, action: Callable[[Task], None], task: Task) -> None:
        """Raises what `action` raises, and `UserError` if the process ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((action, task), self._process.stdin)
            self._process.stdin.flush()
            error: BaseException | None = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            raise UserError(
                "a process that prepares data was killed, perhaps because the memory is full; "
                "start again: finished parts are kept"
            ) from None
        if error is not None:
            raise error

    def kill(self) -> None:
        self._process.kill()


@contextlib.contextmanager
def started(threads: int) -> Iterator[Worker]:
    """A worker whose libraries use so many threads; it ends with the block."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", "from llmmed.data.worker import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        process_group=0,  # Ctrl-C is for the parent to handle
    )
    with process:
        try:
            yield Worker(process)
        finally:
            process.kill()


def main() -> None:
    """What the process does."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    tasks: queue.SimpleQueue[tuple[Callable[[Any], None], Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(tasks,), daemon=True).start()
    while True:
        pickle.dump(_outcome(*tasks.get()), answers)
        answers.flush()


def _receive(tasks: queue.SimpleQueue[tuple[Callable[[Any], None], Any]]) -> None:
    """Ends the process with its input, in the middle of a task too: files are written whole or not at all."""
    with contextlib.suppress(EOFError):
        while True:
            tasks.put(pickle.load(sys.stdin.buffer))
    os._exit(1)


def _outcome(action: Callable[[Any], None], task: Any) -> BaseException | None:
    try:
        action(task)
    except Exception as error:  # noqa: BLE001 - the parent raises it
        return error
    return None
