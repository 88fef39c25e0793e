"""Batches from a thread: in order, and if it dies the training learns of it instead of waiting for ever."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
import torch

from llmmed.data import Batches
from llmmed.training.prefetch import Prefetcher

CPU = torch.device("cpu")


def batches(tokens: object = None) -> Batches:
    return Batches(np.arange(4000, dtype=np.uint16) if tokens is None else tokens, 8, 4, seed=0, shuffle=True)  # type: ignore[arg-type]


def thread() -> threading.Thread:
    return next(each for each in threading.enumerate() if each.name == "batches")


def test_batches_come_in_order() -> None:
    with Prefetcher(batches(), range(12, 80, 4), CPU) as source:
        for index in range(3, 20):
            assert torch.equal(source.next(), batches().get(index))


def test_what_cutting_a_batch_raised_is_raised_where_it_is_awaited() -> None:
    class Vanishing(np.ndarray):  # type: ignore[type-arg]
        def __getitem__(self, key: object) -> object:
            raise OSError(5, "Input/output error")

    with (
        Prefetcher(batches(np.arange(4000).view(Vanishing)), range(20), CPU) as source,
        pytest.raises(OSError, match="Input"),
    ):
        source.next()


@pytest.mark.timeout(30)
def test_a_thread_that_is_killed_is_not_waited_for() -> None:
    with Prefetcher(batches(), range(10_000), CPU) as source:
        source.next()
        killed = thread()
        assert ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(killed.ident or 0), ctypes.py_object(SystemExit)
        )
        with pytest.raises(RuntimeError, match="the thread that cuts batches ended"):
            _ = [source.next() for _ in range(10_000)]


@pytest.mark.timeout(30)
def test_a_thread_that_ended_without_a_word_is_not_waited_for() -> None:
    source = Prefetcher(batches(), range(2), CPU)
    with source:
        source.next()
        source.next()
        with pytest.raises(RuntimeError, match="without a word"):
            source.next()
