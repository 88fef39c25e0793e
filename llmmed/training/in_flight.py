"""Steps that the host has issued and the device has not finished, and what is to be read of them.

To read a loss at once is to wait until the device has nothing left to do, and it idles until the host is ahead again.
Here a log step's values are copied behind the step, and read when the device has passed them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class Mark(Protocol):
    """A moment in the work of a device, behind all that was issued before it was made."""

    def passed(self) -> bool:
        """Whether that work is done."""
        ...

    def wait(self) -> None:
        """Blocks until it is."""
        ...

    def seconds_since(self, earlier: Self) -> float:
        """Of the device, from another mark to this one; both are passed."""
        ...


class HostMark:
    """On a CPU all that was issued is done."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: Self) -> float:
        return self._time - earlier._time


class EventMark:
    """On the current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def passed(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: Self) -> float:
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000


def mark(device: torch.device) -> Mark:
    """A mark behind everything that was issued to `device` so far."""
    return EventMark(device) if device.type == "cuda" else HostMark()


@dataclass(frozen=True)
class Reading:
    """What a step had to tell.

    Attributes:
        step: Steps made by then.
        values: Those that were given with it, by name.
        memory_gib: As given with it.
        steps_per_second: Since the log step before it or the last restart; None if no step was made since, or if it
            was not timed.
    """

    step: int
    values: Mapping[str, float]
    memory_gib: float | None
    steps_per_second: float | None


@dataclass(frozen=True)
class _Start:
    step: int
    mark: Mark


@dataclass(frozen=True)
class _Issued:
    step: int
    mark: Mark
    since: _Start | None  # None: not timed
    names: tuple[str, ...]  # of the values
    values: Tensor | None  # on the CPU, valid once the mark is passed; None: nothing is to be read
    memory_gib: float | None


class InFlight:
    """The steps in the order in which they were issued. On a CPU each is finished when it is added."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._issued: deque[_Issued] = deque()
        self.restart(0)

    def restart(self, step: int) -> None:
        """The time of the next reading begins now, after `step` steps: what was before it does not count."""
        self._since = _Start(step, mark(self._device))

    def add(
        self, step: int, values: Mapping[str, Tensor] | None = None, memory_gib: float | None = None, *,
        timed: bool = True,
    ) -> None:  # fmt: skip
        """A step was issued, the `step`-th, with what to read of it, if anything: 0-d tensors on the device, by name.

        If the reading is not `timed`, the next that is has the time since the timed one before.
        """
        copied = None
        if values is not None:  # from a GPU into pinned memory, in one copy
            copied = torch.stack([value.float() for value in values.values()]).to("cpu", non_blocking=True)
        behind = mark(self._device)
        since = self._since if timed else None
        self._issued.append(_Issued(step, behind, since, tuple(values or ()), copied, memory_gib))
        if values is not None and timed:
            self._since = _Start(step, behind)

    def finished(self, left: int) -> Iterator[Reading]:
        """The readings of finished steps, each once and in order. Waits while more than `left` are unfinished.

        Raises `RuntimeError` if the device failed.
        """
        while self._issued and (len(self._issued) > left or self._issued[0].mark.passed()):
            first = self._issued.popleft()
            first.mark.wait()
            if first.values is not None:
                values = dict(zip(first.names, first.values.tolist(), strict=True))
                yield Reading(first.step, values, first.memory_gib, _speed(first))


def _speed(issued: _Issued) -> float | None:
    if issued.since is None:
        return None
    steps = issued.step - issued.since.step
    return steps / issued.mark.seconds_since(issued.since.mark) if steps else None
