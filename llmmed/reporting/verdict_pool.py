"""The processes of `scripts/verify.py`, side by side. A candidate that ends one, or leaves its GPU in error, costs no
other its verdict."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from llmmed.autotune.gpu_state import free_memory
from llmmed.autotune.verify import Verdict
from llmmed.files import read_json
from llmmed.machine import cores
from llmmed.processes import end, how_it_ended, spawn

_MOST = 8  # processes, if nobody asks for more: each holds PyTorch, and on a GPU a context
_GIB_EACH = 3.0  # of a GPU's free memory, with room to spare: where it ran out, a right candidate would be rejected
# Seconds with a single process: on a CPU it may be through before another, which takes as long to start, would help.
_ALONE = {"cuda": 0.0, "cpu": 3.0}


class Task(NamedTuple):
    """A verdict that is wanted."""

    op: str
    name: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.op} {self.name} in {self.dtype_name}"


class VerdictPool:
    """Processes that work through tasks, each at one of them."""

    def __init__(self, tasks: Sequence[Task], workers: list[_Worker], alone: float, seconds: float) -> None:
        self._seconds = seconds
        self._waiting = deque(enumerate(tasks))
        self._workers = workers
        self._others_start_at = time.monotonic() + alone

    @classmethod
    @contextlib.contextmanager
    def started(
        cls, tasks: Sequence[Task], workers: int | None, seeds: int, shapes: int, seconds: float, device: torch.device
    ) -> Iterator[VerdictPool]:
        """Until the end of the context, and its processes with it.

        Args:
            tasks: What to verify.
            workers: In how many processes; None for as many as are sensible here.
            seeds: How many, of the values.
            shapes: How many random ones.
            seconds: After which a task is `timed_out`.
            device: Where the processes verify.
        """
        workers = min(workers or _sensible_workers(device), len(tasks))
        # Each is one of many: what would take all cores for itself takes its share.
        share = str(max(1, cores() // workers))
        variables = {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share} if workers > 1 else {}
        with tempfile.TemporaryDirectory(prefix="llmmed-verify-") as folder:
            answers = [Path(folder) / f"answer{number}.json" for number in range(workers)]
            each = [_Worker(answer, seeds, shapes, variables) for answer in answers]
            pool = cls(tasks, each, _ALONE[device.type], seconds)
            try:
                yield pool
            finally:
                end(*(worker.process for worker in pool._workers if worker.process is not None))

    @property
    def is_done(self) -> bool:
        return not self._waiting and not self.under_way()

    def look(self) -> Iterator[tuple[int, Verdict]]:
        """The verdicts that have come since the last call, each with its task's place. Sees to it that nobody idles."""
        for worker in self._workers:
            if worker.task is not None and (verdict := worker.take_verdict(self._seconds)) is not None:
                yield worker.place, verdict
            if worker.task is None and self._waiting and self._may_work(worker):
                worker.give(*self._waiting.popleft())

    def under_way(self) -> list[tuple[float, Task]]:
        """The tasks in hand and for how many seconds, the longest first."""
        now = time.monotonic()
        return sorted(((now - w.since, w.task) for w in self._workers if w.task is not None), key=lambda each: -each[0])

    def _may_work(self, worker: _Worker) -> bool:
        return worker is self._workers[0] or time.monotonic() >= self._others_start_at


def _sensible_workers(device: torch.device) -> int:
    free = free_memory(device)
    room = _MOST if free is None else int(free / _GIB_EACH)
    return max(1, min(cores(), room, _MOST))


class _Worker:
    """A process that is given one task after the other. Where it has ended, the next task has another."""

    def __init__(self, answer: Path, seeds: int, shapes: int, variables: dict[str, str]) -> None:
        self.task: Task | None = None
        self.place, self.since = 0, 0.0
        self.process: subprocess.Popen[bytes] | None = None  # None once it has ended
        self._is_fresh = True  # the process has answered nothing yet
        self._answer, self._variables = answer, variables
        self._arguments = [str(answer), str(seeds), str(shapes)]

    def give(self, place: int, task: Task) -> None:
        self.place, self.task, self.since = place, task, time.monotonic()
        if self.process is None:
            self.process = spawn("llmmed.reporting.verdict_worker", self._arguments, None, self._variables)
            self._is_fresh = True
        assert self.process.stdin is not None
        line = json.dumps([task.op, task.name, task.dtype_name]) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it has just ended, as `take_verdict` finds
            os.write(self.process.stdin.fileno(), line.encode())

    def take_verdict(self, seconds: float) -> Verdict | None:
        """Of the task in hand, once there is one or `seconds` have passed, and the task is out of hand. One in whose
        time a process ends that has answered before, for which that other candidate may be to blame, is given to a
        fresh process."""
        assert self.process is not None
        assert self.task is not None
        exit_code = self.process.poll()  # what it wrote until then counts
        if self._answer.exists():
            answer = read_json(self._answer)
            self._answer.unlink()
            self.task, self._is_fresh = None, False
            if answer["is_last"]:
                self._end()
            return Verdict(**answer["verdict"])
        if exit_code is None and time.monotonic() - self.since > seconds:
            self._end()
            self.task = None
            reason = f"took longer than {seconds:g} s, its process's start included; seconds=<number> gives it more"
            return Verdict("timed_out", reason, None, None, 0)
        if exit_code is None:
            return None
        was_fresh = self._is_fresh
        self._end()
        if not was_fresh:
            self.give(self.place, self.task)
            return None
        self.task = None
        return Verdict("crashed", f"the process {how_it_ended(exit_code)} while it was verified", None, None, 0)

    def _end(self) -> None:
        assert self.process is not None
        end(self.process)
        self.process = None
