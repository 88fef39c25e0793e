"""Runs tasks on all cores, in processes of their own, and tells the progress.

Processes, because turning one library call's result into numbers holds Python's lock: two processes encode faster than
one process with two threads. There are at most `_MOST_PROCESSES`, which bounds the memory; the cores left over serve
the tokenizers library's own threads.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from llmmed.data.worker import Worker, started
from llmmed.machine import cores

Task = TypeVar("Task")
Report = Callable[[str], None]

_MOST_PROCESSES = 8
_SMALL = 16 * 2**20  # bytes of text that are not worth starting processes for
_SECONDS_BETWEEN_LINES = 15.0


def run(
    action: Callable[[Task], None], tasks: Sequence[Task], sizes: Sequence[int], doing: str, report: Report
) -> None:
    """Does `action` on each task, in any order.

    Args:
        action: A function of a module; it returns nothing and leaves its result in a file.
        tasks: Picklable.
        sizes: Of the tasks, in bytes of text.
        doing: What to call it, as in "tokenising".
        report: Is told the progress every few seconds where no terminal shows it.

    Raises:
        UserError: one that a task raised, or a process was killed.
    """
    processes = min(cores(), _MOST_PROCESSES, len(tasks))
    with progress(doing, sum(sizes), report) as advance:
        if processes < 2 or sum(sizes) < _SMALL:
            for task, size in zip(tasks, sizes, strict=True):
                action(task)
                advance(size)
            return
        _run_in_processes(action, tasks, sizes, processes, max(1, cores() // processes), advance)


def run_alone(action: Callable[[Task], None], task: Task, size: int) -> None:
    """One task; if it is large in a process of its own, so that its memory is given back."""
    if size < _SMALL:
        action(task)
    else:
        _run_in_processes(action, [task], [size], 1, cores(), lambda size: None)


@contextmanager
def progress(doing: str, total: int, report: Report) -> Iterator[Callable[[int], None]]:
    """A bar of megabytes on a terminal; elsewhere a line every few seconds. Yields what takes the bytes just done.

    Args:
        doing: As in "tokenising".
        total: Bytes, or 0 if that is not known.
        report: Takes the lines.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console()
    if console.is_terminal:
        columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(doing, total=total or None)
            yield lambda size: bar.update(task, advance=size)
        return
    done, told = 0, time.monotonic()

    def advance(size: int) -> None:
        nonlocal done, told
        done += size
        if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            report(f"{doing}: {done / 1e6:,.0f}" + (f" of {total / 1e6:,.0f} MB" if total else " MB"))

    yield advance


def _run_in_processes(
    action: Callable[[Task], None],
    tasks: Sequence[Task],
    sizes: Sequence[int],
    processes: int,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """One thread here for each process there."""
    waiting = iter(zip(tasks, sizes, strict=True))
    lock = threading.Lock()
    workers: list[Worker] = []
    over = threading.Event()

    def work() -> None:
        with started(threads) as worker:
            workers.append(worker)
            while not over.is_set():
                with lock:
                    task, size = next(waiting, (None, 0))
                if task is None:
                    return
                worker.do(action, task)
                with lock:
                    advance(size)

    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(work) for _ in range(processes)]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            over.set()
            for worker in workers:
                worker.kill()
            raise
