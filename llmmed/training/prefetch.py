"""Batches cut ahead of time, in a thread, and sent to the device while it computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmmed.data import Batches

_AHEAD = 4  # batches
_LOOK_SECONDS = 1.0  # how often a waiting step looks whether the thread is still there


class Prefetcher:
    """A context that yields the batches beginning at these windows, in order."""

    def __init__(self, batches: Batches, windows: Iterable[int], device: torch.device) -> None:
        self._device = device
        self._queue: queue.Queue[Tensor | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(batches, windows), name="batches", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        while self._thread.is_alive():
            _drain(self._queue)
            self._thread.join(timeout=0.01)

    def next(self) -> Tensor:
        """The next batch on the device. Raises what cutting it raised, `RuntimeError` if the thread ended otherwise."""
        found = self._wait()
        if isinstance(found, Exception):
            raise found
        if isinstance(found, BaseException):  # meant for the thread alone: SystemExit would end the run as finished
            raise RuntimeError(f"the thread that cuts batches ended: {type(found).__name__}") from found
        return found.to(self._device, non_blocking=True)

    def _wait(self) -> Tensor | BaseException:
        while True:
            alive = self._thread.is_alive()  # before looking: what it left behind is still taken
            try:
                return self._queue.get(timeout=_LOOK_SECONDS if alive else 0)
            except queue.Empty:
                if not alive:
                    raise RuntimeError("the thread that cuts batches ended without a word") from None

    def _fill(self, batches: Batches, windows: Iterable[int]) -> None:
        try:
            for first in windows:
                batch = batches.beginning(first)
                self._queue.put(batch.pin_memory() if self._device.type == "cuda" else batch)
                if self._stopping.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - whatever it is, the training thread must learn of it
            self._queue.put(error)


def _drain(waiting: queue.Queue[Any]) -> None:
    try:
        while True:
            waiting.get_nowait()
    except queue.Empty:
        return
