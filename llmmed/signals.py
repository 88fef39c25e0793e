"""SIGTERM, SIGINT, SIGHUP, by which a terminal tells that it closes, and SIGUSR2, by which SLURM tells of a job's time
limit, end a run soon and in order, whatever it is doing. Without torch, to be there from the start.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
_OUTPUTS = (1, 2)  # stdout and stderr
_LOOK_SECONDS = 0.2
_AGAIN_SECONDS = 3.0  # an exception raised inside a finalizer or a callback is swallowed by the interpreter
INTERRUPTED = 130  # the exit code, as the shell's after Ctrl-C
UNREAD = "nobody reads the output any more"  # what a SIGHUP is called that nobody sent
_unread = threading.Event()


def reader_is_gone(output: int) -> None:
    """Sends an output nowhere that nobody reads any more: a `head` has enough, a `tee` has died. A run does as when its
    terminal closes: it ends in order, or under nohup goes on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:
        _unread.set()
        signal.raise_signal(signal.SIGHUP)


def say(line: str) -> None:
    """Prints a line, if somebody reads it."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        reader_is_gone(_OUTPUTS[0])


class Interrupted(BaseException):
    """The run was asked to stop. The message says by what and when, and whether a checkpoint was written.

    Not an `Exception`: it may be raised between any two instructions, where nobody who handles errors expects it.
    """


class StopRequest:
    """A context in which the first of these signals raises `Interrupted`, or, while `waits`, only sets `name`.

    While it waits, somebody looks at `name` where it is a good moment to stop; a second SIGINT raises all the same.

    Args:
        give_up: Python's handlers run between two instructions of the main thread, so a library that computes for
            minutes holds them off. If that thread has not left this context after `grace` seconds, not counting those
            in which it waits, another one calls this with the signal's name and ends the process.
        grace: Seconds.
    """

    def __init__(self, give_up: Callable[[str], None] | None = None, grace: float = 10.0) -> None:
        self.name: str | None = None  # of the signal, or `UNREAD`
        self.waits = False
        self.moment = "before the first step was done"  # for the message, if it does not wait
        self.raised = False  # whatever happens from then on is a consequence
        self._settled = False
        self._give_up, self._grace = give_up, grace
        self._before: dict[int, object] = {}
        self._left = threading.Event()
        self._pipe: tuple[int, int] | None = None
        self._terminals: list[int] = []

    def __enter__(self) -> StopRequest:
        _unread.clear()
        self._terminals = [output for output in _OUTPUTS if os.isatty(output)]
        for number in _NUMBERS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:  # under nohup
                continue
            self._before[number] = signal.signal(number, self._handle)
        if self._give_up is not None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, args=(self._give_up, self._pipe[0]), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            self._thread.join()
            for end in self._pipe:
                os.close(end)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wait_no_more(self) -> None:
        """Raises `Interrupted` from now on, and at once if a signal came while it waited."""
        self.waits = False
        if self.name is not None and not self.raised:
            self.raised = True
            raise Interrupted(f"{self.name} {self.moment}")

    def goes_on_from(self, step: int) -> None:
        """Steps that a checkpoint has behind it are done, whatever comes before this process makes another."""
        self.moment = f"after step {step}, before another was done"

    def settle(self) -> None:
        """`Interrupted` was caught by whom it is meant for; nothing is raised any more."""
        self._settled = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminals()
        again = self.name is not None and number == signal.SIGINT
        self.name = self.name or _name(number)
        if (not self.waits or again) and not self.raised and not self._settled:
            self.raised = True  # what follows now is cleaning up, which no further signal may disturb
            raise Interrupted(f"{self.name}, then SIGINT" if again else f"{self.name} {self.moment}")

    def _leave_terminals(self) -> None:
        """What is still told has no reader; a write to a terminal that is gone would fail and end the run."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in self._terminals:
            os.dup2(nowhere, output)
        os.close(nowhere)

    def _watch(self, give_up: Callable[[str], None], pipe: int) -> None:
        """Reads what the operating system's handler writes, which nothing holds off."""
        name, left, since = "", self._grace, 0.0
        while not self._left.is_set():
            readable, _, _ = select.select([pipe], [], [], _LOOK_SECONDS)
            if readable:
                arrived = [_name(number) for number in os.read(pipe, 64) if number in _NUMBERS]
                name = name or "".join(arrived[:1])
                continue
            if name and not self.waits:
                left -= _LOOK_SECONDS
                since += _LOOK_SECONDS
            if since > _AGAIN_SECONDS and self.raised and not self._settled:
                self.raised, since = False, 0.0
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if left < 0 and not self._left.is_set():
                with contextlib.suppress(Exception):
                    give_up(name)
                os._exit(INTERRUPTED)


def _name(number: int) -> str:
    return UNREAD if number == signal.SIGHUP and _unread.is_set() else signal.Signals(number).name
