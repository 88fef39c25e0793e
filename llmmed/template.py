"""Processes that start at once: forks of one, the template, that has imported what they need. Linux only.

The template imports, starts no threads, and asks CUDA nothing. It is asked for processes through a socket, and gets
three descriptors with each: the process's standard input, its log, and a pipe. There the process says that it has come,
`<pid>`, and the template how it and its group have ended, `<pid> <exit code>`. A pipe that ends before says that the
template has, or could not fork: a process that has not come is then started without it, and one that has is over.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import IO, NoReturn

from llmmed import collector
from llmmed.processes import Process, command, end, how_it_ended, last_line, spawn, started_process

logger = logging.getLogger(__name__)

STARTS_OVER = "starts over, since not all works in a fork"
_PATIENCE = 60.0  # seconds until a process that was asked for must have come; imports take ten
_MOST_BYTES = 2**16  # of a request
_POLL_SECONDS = 0.5  # for whether that patience has ended


class Template:
    """The parent's side."""

    def __init__(self, process: Process, control: socket.socket, log: Path, variables: Mapping[str, str]) -> None:
        self._process, self._control, self._log, self._variables = process, control, log, variables
        self._is_missed = False

    @classmethod
    @contextlib.contextmanager
    def started(cls, modules: list[str], log: Path, variables: Mapping[str, str]) -> Iterator[Template]:
        """Until the end of the context a template that imports these modules, with environment variables that its forks
        do not have. Does not wait until it is ready."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, started_process(__name__, modules, log, variables, theirs.fileno()) as process:
            theirs.close()
            yield cls(process, ours, log, variables)

    @contextlib.contextmanager
    def started_process(
        self, module: str, arguments: list[str], log: Path, variables: Mapping[str, str] | None = None
    ) -> Iterator[Process]:
        """As `llmmed.processes.started_process`. The process comes as soon as the template is ready."""
        change = {name: os.environ.get(name) for name in self._variables} | dict(variables or {})
        request = json.dumps([module, arguments, change]).encode()
        gives_up_at = time.monotonic() + _PATIENCE
        with log.open("wb") as output:
            (its_stdin, stdin), (status, its_status) = os.pipe(), os.pipe()
            process = _Fork(
                module, os.fdopen(stdin, "wb"), status, lambda: self._spawn(module, arguments, log, variables),
                lambda: self._lose_patience(gives_up_at),
            )  # fmt: skip
            try:
                # What cannot be sent, mostly since the template has ended, is seen by the end of `status`.
                with contextlib.suppress(OSError):
                    if len(request) <= _MOST_BYTES:
                        socket.send_fds(self._control, [request], [its_stdin, output.fileno(), its_status])
                os.close(its_stdin)
                os.close(its_status)
                process.poll()
                yield process
            finally:
                end(process)
                os.close(status)

    def _lose_patience(self, at: float) -> None:
        """Ends a template that hangs, most likely in its imports: whoever waits for it then goes on without."""
        if time.monotonic() > at:
            end(self._process)

    def _spawn(
        self, module: str, arguments: list[str], log: Path, variables: Mapping[str, str] | None
    ) -> subprocess.Popen[bytes]:
        if not self._is_missed:
            self._is_missed = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            code, words = self._process.poll(), last_line(self._log)
            told = "could not fork" if code is None else how_it_ended(code)
            told = f"{told}: {words}" if words else told
            logger.info("each process imports what it needs, which takes longer: their template %s", told)
        return spawn(module, arguments, log, variables)


class _Fork:
    """A process that a template forks, or, where that has ended before, one that is started `instead`.

    `has_not_come` is called as long as there is neither. `pid` is None then, and once the process and its group have
    ended, when their number may be another's.
    """

    def __init__(
        self, name: str, stdin: IO[bytes], status: int, start_instead: Callable[[], subprocess.Popen[bytes]],
        has_not_come: Callable[[], None],
    ) -> None:  # fmt: skip
        self.pid: int | None = None
        self._has_come = False
        self._has_not_come = has_not_come
        self.stdin: IO[bytes] = stdin
        self._code: int | None = None
        self._name, self._status, self._start_instead = name, status, start_instead
        self._instead: subprocess.Popen[bytes] | None = None

    @property
    def returncode(self) -> int:
        code = self.poll()
        assert code is not None
        return code

    def poll(self) -> int | None:
        if self._instead is not None:
            return self._instead.poll()
        if self._code is None and wait_for([self._status], 0):
            self._listen()
        elif not self._has_come:
            self._has_not_come()
        if not self._has_come and self.stdin.closed:
            self._code = -signal.SIGKILL  # nobody waits for it any more: if it comes, it ends
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._instead is not None:
                return self._instead.wait(left)
            if left == 0.0:
                raise subprocess.TimeoutExpired(self._name, timeout or 0.0)
            wait_for([self._status], _POLL_SECONDS if left is None else min(left, _POLL_SECONDS))
        return code

    def _listen(self) -> None:
        said = os.read(self._status, 4096)
        for line in said.splitlines():
            self._has_come = True
            self.pid, *code = map(int, line.split())
            if code:
                self.pid, self._code = None, code[0]
        if said:
            return
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.pid, self._code = None, -signal.SIGKILL
        elif not self.stdin.closed:
            self.stdin.close()
            self._has_come = True
            self._instead = self._start_instead()
            assert self._instead.stdin is not None
            self.pid, self.stdin = self._instead.pid, self._instead.stdin


_instead_of_fork: list[str] = []


def start_over_unless(works: Callable[[], object]) -> None:
    """In a fork, begins this process anew as one that imports for itself, if `works` raises: a device may not work in
    the fork of a process that has touched it. Elsewhere does nothing; what does not work there tells its own tale."""
    if not _instead_of_fork:
        return
    try:
        works()
    except Exception as error:  # noqa: BLE001 - whatever it is, it may be of the fork
        print(f"{STARTS_OVER}: {error}", file=sys.stderr, flush=True)
        os.execv(sys.executable, _instead_of_fork)


def main() -> None:
    """The template's, and, with a module of its own, that of each fork."""
    control = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    with collector.still():
        for name in sys.argv[1:]:
            importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        print("its imports have started threads, which no fork would have", flush=True)
        os._exit(1)  # not after those threads
    sys.stdout.flush()
    module, arguments, change = _forked(control)
    for name, value in change.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    global _instead_of_fork
    _instead_of_fork = command(module, arguments)
    _draw_anew()
    sys.argv[1:] = arguments
    importlib.import_module(module).main()


def _forked(control: socket.socket) -> tuple[str, list[str], dict[str, str | None]]:
    """Returns in each fork, with what that is to do: a module, its arguments, and changes to the environment."""
    running: dict[int, int] = {}  # process -> the pipe where its end is to be told
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing would wake
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready = wait_for([control, woken])
        if woken in ready:
            woken.recv(4096)
        for process in list(running):
            # Its number, which is its group's, is nobody else's until it has been waited for.
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process, signal.SIGKILL)
            _, code = os.waitpid(process, 0)
            _say(running.pop(process), f"{process} {os.waitstatus_to_exitcode(code)}")
        if control not in ready:
            continue
        request, descriptors, *_ = socket.recv_fds(control, _MOST_BYTES, 3)
        if not request:
            _end(running)
        try:
            stdin, log, status = descriptors
            process = os.fork()
        except (OSError, ValueError) as error:  # there are too many processes, or too many files
            print(error, flush=True)
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        if not process:
            break
        running[process] = status
        os.close(stdin)
        os.close(log)
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for standard, descriptor in enumerate((stdin, log, log)):
        os.dup2(descriptor, standard)
    for descriptor in (stdin, log, *running.values()):
        os.close(descriptor)
    for each in (control, woken, wake):
        each.close()
    _say(status, f"{os.getpid()}")
    module, arguments, change = json.loads(request)
    return module, arguments, change


def _say(status: int, text: str) -> None:
    """To the parent, if that still listens: a process that nobody waits for ends with its standard input."""
    with contextlib.suppress(BrokenPipeError):
        os.write(status, f"{text}\n".encode())
    os.close(status)


def _end(running: Iterable[int]) -> NoReturn:
    """Ends the template, whose parent has ended, and its forks, with all that they started."""
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)
    raise AssertionError


def _draw_anew() -> None:
    """So that no two forks draw the same. Python's own generator sees to that by itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
