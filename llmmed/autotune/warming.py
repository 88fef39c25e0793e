"""The parent's side of compiling ahead: starts the processes, and ends what hangs."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from llmmed.autotune.board import STEP, Board
from llmmed.autotune.journal import Job
from llmmed.machine import cores
from llmmed.processes import Process, Starter, end, how_it_ended, last_line, started_process

logger = logging.getLogger(__name__)

_LEAST, _MOST = 3, 15  # processes; with fewer it is not worth their start
# A compiler that hangs is dealt with by those who judge: seconds in which nothing gets done, and in all.
_STANDSTILL, _SECONDS = 45.0, 90.0


def compiles_ahead(device: str) -> bool:
    """Whether a run on this device has processes that compile ahead, if it has enough to compile."""
    return device == "cuda" and cores() - 1 >= _LEAST


def warming_processes(job: Job) -> int:
    """How many processes compile ahead: one compiles on a single core."""
    candidates = sum(len(task.verify) + len(task.verified) for task in job.tasks)
    count = min(cores() - 1, candidates, _MOST)
    return count if compiles_ahead(job.device) and count >= _LEAST else 0


class Warming:
    """Processes that fill the compilers' caches while the one that judges starts, waits, and judges."""

    def __init__(self, board: Board, processes: dict[Process, Path], standstill: float = _STANDSTILL) -> None:
        """`processes` with the files that they write to."""
        self._board, self._processes, self._standstill = board, processes, standstill
        self._began = self._progress = time.perf_counter()
        self._count = 0
        self._over = False

    @classmethod
    @contextlib.contextmanager
    def started(cls, job: Job, folder: Path, seconds: float, start: Starter = started_process) -> Iterator[Warming]:
        """Until the end of the context. Where for `seconds`, or 45, nothing gets done, nobody waits any longer."""
        path, board = folder / "warm.json", folder / "warm"
        job.write(path)
        warming = cls(Board(board), {}, min(_STANDSTILL, seconds))
        # Each is one of many: what would take all cores for itself takes one.
        alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        with contextlib.ExitStack() as stack:
            for number in range(warming_processes(job)):
                log = folder / f"warm{number}.log"
                process = start("llmmed.autotune.warm", [str(path), str(board)], log, alone)
                warming._processes[stack.enter_context(process)] = log
            try:
                yield warming
            finally:
                warming._tell_of_step()
                warming._tell_of_deaths()

    def look(self) -> None:
        """Sees to it that nobody waits for processes that hang or have ended. To be called now and then."""
        if self._over:
            return
        awaited, count, now = self._board.is_awaited(), self._board.count(but=STEP), time.perf_counter()
        if count > self._count:
            self._count, self._progress = count, now
        in_time = now - self._progress < self._standstill and now - self._began < _SECONDS
        ended = [each.poll() is not None for each in self._processes]
        if awaited and in_time and not all(ended):
            return
        self._over = True
        for process in self._processes if awaited else ():
            end(process)
        self._board.end()
        done = sorted(self._board.finished(but=STEP), reverse=True)
        slowest = "".join(f"\n{line}" for line in done[:5])
        logger.info("compiled %d units ahead; the slowest, in s:%s", len(done), slowest)

    def _tell_of_step(self) -> None:
        plans = sorted(self._board.finished(STEP), reverse=True)
        failed = [line for line in plans if ": " in line]
        if plans:
            lines = "".join(f"\n{line}" for line in [*failed[:3], *plans[:5]])
            told = f"compiled {len(plans) - len(failed)} plans ahead for the step, {len(failed)} could not be"
            logger.info("%s; some of these and the slowest, in s:%s", told, lines)

    def _tell_of_deaths(self) -> None:
        """Nothing depends on these processes but time, so that no one else would notice."""
        for process, log in self._processes.items():
            ended = process.poll()
            if ended and ended != -signal.SIGKILL:
                logger.info("a process that compiled ahead %s: %s", how_it_ended(ended), last_line(log))
