"""Forward and backward of one micro-batch: launched from the host, or replayed from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmmed.autotune.plan import Mode
from llmmed.compose import accumulation_steps
from llmmed.config import Config
from llmmed.model import Transformer
from llmmed.training.copies import keep_copies

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(tokens, targets, scale) -> scale * mean loss`: the model."""


class MicroStep(Protocol):
    """Computes a loss and adds its gradients to those of the model's leaves."""

    def run(self, batch: Tensor, scale: Tensor, *, first: bool) -> Tensor:
        """A micro-batch [batch, seq + 1] on the device. The first of a step replaces the gradients that are there.

        Returns the scaled loss, 0-d, valid until the next call.
        """
        ...


def build_micro_step(model: Transformer, config: Config, mode: Mode) -> MicroStep:
    """The micro-step of a run. `mode` says whether the model is compiled, which happens in place, and replayed."""
    if mode != "eager":
        model.compile_parts()
    keep_copies(model, config, mode)
    if mode == "graphs":
        return GraphedMicroStep(model, model.leaves, accumulates=accumulation_steps(config.train) > 1)
    return LaunchedMicroStep(model, model.leaves)


class LaunchedMicroStep:
    """Every kernel is launched by the host."""

    def __init__(self, loss: Loss, leaves: Sequence[Tensor]) -> None:
        self._loss, self._leaves = loss, leaves

    def run(self, batch: Tensor, scale: Tensor, *, first: bool) -> Tensor:
        if first:
            _drop_gradients(self._leaves)
        return _forward_and_backward(self._loss, batch, scale)


class GraphedMicroStep:
    """Two CUDA graphs over the same memory: one that writes the gradients, for the first micro-batch of a step, and one
    that adds to them.

    A replay costs the host one call instead of hundreds of launches; a small model waits for the host otherwise. The
    gradients live in the graphs' memory, so nobody may set them to None; `first` overwrites them. Captured at the first
    call, after warming up on its micro-batch, which changes no parameter.

    Several may share a memory pool, by its handle: then one's activations lie where another's were.
    """

    _WARM_UP = 3

    def __init__(
        self,
        loss: Loss,
        leaves: Sequence[Tensor],
        *,
        accumulates: bool,
        pool: torch.cuda._POOL_HANDLE | None = None,
    ) -> None:
        self._loss, self._leaves, self._accumulates = loss, leaves, accumulates
        self._pool = pool
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.gradients: list[Tensor] = []  # of the leaves, in the graphs' memory

    def run(self, batch: Tensor, scale: Tensor, *, first: bool) -> Tensor:
        if not self._graphs:
            self._capture(batch, scale)
        self._batch.copy_(batch)
        self._scale.copy_(scale)
        graph, loss = self._graphs[first]
        graph.replay()
        return loss

    def _capture(self, batch: Tensor, scale: Tensor) -> None:
        self._batch, self._scale = batch.clone(), scale.clone()
        stream = torch.cuda.Stream(batch.device)
        stream.wait_stream(torch.cuda.current_stream(batch.device))
        with torch.cuda.stream(stream):
            for _ in range(self._WARM_UP):
                _drop_gradients(self._leaves)
                _forward_and_backward(self._loss, self._batch, self._scale)
        torch.cuda.current_stream(batch.device).wait_stream(stream)
        _drop_gradients(self._leaves)
        pool = self._pool or torch.cuda.graph_pool_handle()
        for first in (True, False) if self._accumulates else (True,):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                loss = _forward_and_backward(self._loss, self._batch, self._scale)
            self._graphs[first] = (graph, loss)
        self.gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._leaves]


def _forward_and_backward(loss_of: Loss, batch: Tensor, scale: Tensor) -> Tensor:
    loss = loss_of(batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), scale)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _drop_gradients(leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
