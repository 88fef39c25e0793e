"""The progress of a training run: a live line on a terminal, a few plain lines in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_LINES = 20  # of a whole run, where there is no terminal
_SETTLED = 3  # steps: the first compiles, the second captures, the third is traced


class TrainingProgress:
    """A context: `show` at log intervals, `note` for what should stay visible."""

    def __init__(self, console: Console, first_step: int, max_steps: int) -> None:
        self._console, self._max_steps, self._first = console, max_steps, first_step
        self._every = max(1, max_steps // _LINES)
        self._last_line = first_step
        self._since: tuple[float, int] | None = None  # when and at which step the time left begins to be estimated
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(compact=True),
                console=console,
            )
            self._task = self._bar.add_task("training", total=max_steps, completed=first_step, facts="first step ...")

    def __enter__(self) -> TrainingProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """`step` optimizer steps have been issued."""
        if step == self._first + _SETTLED:
            self._since = time.perf_counter(), step
        if self._bar:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        facts = _facts(metrics)
        if self._bar:
            self._bar.update(self._task, facts=facts)
        elif step >= self._last_line + self._every or step == self._max_steps:
            self._last_line = step
            self._console.print(f"step {step}/{self._max_steps}  {facts}{self._left(step)}", markup=False)

    def _left(self, step: int) -> str:
        """How long the rest of the run takes, if there is something to go by."""
        since, first = self._since or (0.0, step)
        if step <= first:
            return ""
        left = (time.perf_counter() - since) / (step - first) * (self._max_steps - step)
        return f"  {_duration(left)} left"

    def note(self, text: str) -> None:
        logger.info("%s", text)
        self._console.print(text, markup=False)


def _facts(metrics: Mapping[str, float]) -> str:
    parts = [f"loss {metrics['loss']:.3f}"]
    if "tokens_per_second" in metrics:  # there is none yet at the first step
        parts.append(f"{metrics['tokens_per_second']:,.0f} tok/s")
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.0%}")
    if "memory_gib" in metrics:
        parts.append(f"{metrics['memory_gib']:.1f} GiB")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
