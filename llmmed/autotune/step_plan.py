"""One plan as the training will build it: a model of some depth, ready to run, on parameters that all plans share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmmed.autotune.plan import Mode
from llmmed.config import Config
from llmmed.kernels.base import Kernels
from llmmed.model import Transformer
from llmmed.optim import build_optimizers
from llmmed.training.copies import keep_copies
from llmmed.training.micro_step import GraphedMicroStep, LaunchedMicroStep

WARM_UP = 3


class Subject:
    """A plan at some depth, warmed up and ready to run on a fixed batch [batch, seq + 1].

    `takes_memory` says whether its peak is measured, which takes another pass.
    """

    def __init__(
        self, model: Transformer, batch: Tensor, scale: Tensor, mode: Mode,
        pool: torch.cuda._POOL_HANDLE | None, *, takes_memory: bool = True,
    ) -> None:  # fmt: skip
        self._names = [name for name, _ in model.named_parameters()]
        if mode != "eager":
            model.compile_parts()
        self._leaves = model.leaves
        self._batch, self._scale = batch, scale
        self._micro_step: LaunchedMicroStep | GraphedMicroStep = LaunchedMicroStep(model, self._leaves)
        self.run()  # compiles
        self.memory_mib = self._peak_mib() if takes_memory and batch.device.type == "cuda" else None
        if mode == "graphs":
            self._micro_step = GraphedMicroStep(model, self._leaves, accumulates=False, pool=pool)
        for _ in range(WARM_UP):
            self.run()

    def run(self) -> None:
        self._micro_step.run(self._batch, self._scale, first=True)

    def gradients(self, batch: Tensor) -> dict[str, Tensor]:
        """Of every parameter, copied in float32, on another batch."""
        self._micro_step.run(batch, self._scale, first=True)
        grads = zip(self._names, self._current_gradients(), strict=True)
        return {name: gradient.to(torch.float32, copy=True) for name, gradient in grads}

    def _current_gradients(self) -> list[Tensor]:
        if isinstance(self._micro_step, GraphedMicroStep):
            return self._micro_step.gradients
        return [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in self._leaves]

    def _peak_mib(self) -> float:
        """Of gradients, activations and copies of weights. Taken launched: a replayed graph shows nothing of it."""
        device = self._batch.device
        for leaf in self._leaves:
            leaf.grad = None
        release(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.run()
        torch.cuda.synchronize(device)
        copies = sum(leaf.nbytes for leaf in self._leaves if leaf.dtype != torch.float32)
        return (torch.cuda.max_memory_allocated(device) - before + copies) / 2**20


def at_depth(config: Config, weights: Transformer, kernels: Kernels, depth: int) -> Transformer:
    """A model of fewer layers under a plan, on the parameters that all plans share."""
    model = Transformer.for_training(shallow(config, depth), kernels, "meta")
    shared: Mapping[str, nn.Parameter] = dict(weights.named_parameters())
    model.load_state_dict({name: shared[name] for name, _ in model.named_parameters()}, assign=True)
    model.cos, model.sin = weights.cos, weights.sin
    return model


def deepened(config: Config, weights: Transformer) -> Transformer:
    """A model with all layers: those that are there as they are, the others with random numbers."""
    model = Transformer.for_training(config, weights.kernels, "meta")
    _give_numbers(model, dict(weights.named_parameters()), weights.cos.device)
    model.cos, model.sin = weights.cos, weights.sin
    return model


def _give_numbers(model: Transformer, given: Mapping[str, nn.Parameter], device: torch.device) -> None:
    """Gives a model without memory its parameters. Those that are not given are drawn on the device; a run draws
    its own on the host, which takes seconds in a large model."""
    found = dict(given)
    for name, parameter in model.named_parameters():
        if name not in found:
            drawn = torch.ones if parameter.ndim == 1 else torch.randn
            found[name] = nn.Parameter(drawn(parameter.shape, device=device) * (1.0 if parameter.ndim == 1 else 0.02))
    model.load_state_dict(found, assign=True)


def shallow(config: Config, depth: int) -> Config:
    return replace(config, model=replace(config.model, n_layers=depth))


def optimizer_update(config: Config, kernels: Kernels, mode: Mode) -> Callable[[], None]:
    """The optimizer's step of the whole model under a plan, on random gradients."""
    model = Transformer.for_training(config, kernels, "meta")
    _give_numbers(model, {}, torch.device(config.device))
    keep_copies(model, config, mode)
    for leaf in model.leaves:
        leaf.grad = torch.randn_like(leaf)
    optimizers = build_optimizers(model, config.optimizer)

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return update


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
