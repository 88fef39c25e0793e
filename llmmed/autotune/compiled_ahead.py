"""Compiles a plan's parts into the compilers' caches on disk, without running them and without their memory.

The model and its batch are fake tensors: they have shapes, strides and a device, and no values. Whatever the compiler
gives back for a graph is put aside, and the graph itself, on fake tensors, says what comes out, so that backward is
traced and compiled as well. A process that runs the same plan for real finds all of it in the caches.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llmmed.autotune.confirm import Choice
from llmmed.autotune.plan import Mode
from llmmed.autotune.step_plan import shallow
from llmmed.config import Config
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer
from llmmed.optim import build_optimizers
from llmmed.optim.adamw import CopiedAdamW
from llmmed.optim.fusing import fused_by
from llmmed.optim.muon import Muon
from llmmed.training.copies import keep_copies
from llmmed.training.micro_step import LaunchedMicroStep

PARTS = 3
"""Embedding, block, loss."""


class _Compiled(Exception):
    """A graph was in the caches already, so that there is nothing to take its outputs from."""


def compile_ahead(config: Config, choice: Choice, mode: Mode, parts: Collection[int] = range(PARTS)) -> None:
    """Compiles what the model calls under a plan: embedding, one block, loss, or some of them, forward and backward."""
    one = shallow(config, 1)
    kernels = load_kernels({**default_choice(), **choice})
    with FakeTensorMode(allow_non_fake_inputs=True), _running_nothing(parts) as backend:
        model = Transformer.for_training(one, kernels, config.device)
        shape = (config.train.micro_batch_size, config.train.seq_len + 1)
        batch = torch.zeros(shape, dtype=torch.int64, device=config.device)
        model.compile_parts(backend)
        keep_copies(model, config, mode)
        step = LaunchedMicroStep(model, model.leaves)
        step.run(batch, torch.ones((), device=config.device), first=True)


def compile_update_ahead(config: Config, mode: Mode) -> None:
    """Compiles what the optimizers do with a parameter, ours and not PyTorch's: the same under every plan.

    One layer has parameters of all shapes that there are.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _running_nothing() as backend:
        model = Transformer.for_training(shallow(config, 1), load_kernels(default_choice()), config.device)
        keep_copies(model, config, mode)
        for leaf in model.leaves:
            leaf.grad = torch.empty_like(leaf)
        with fused_by(backend):
            for optimizer in build_optimizers(model, config.optimizer):
                if isinstance(optimizer, (CopiedAdamW, Muon)):
                    optimizer.step()


@contextlib.contextmanager
def _running_nothing(parts: Collection[int] | None = None) -> Iterator[Callable[..., Any]]:
    """A backend that compiles as Inductor does: of the graphs that it meets all, or some by number; none is run."""
    from torch._inductor import compile_fx
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime import benchmarking

    graphs: dict[int, tuple[object, torch.fx.GraphModule]] = {}
    met = itertools.count()

    def compile_it(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        before = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))  # the compiler changes it
        compiled = compile_fx.compile_fx_inner(graph, inputs, **options)
        graphs[id(compiled)] = compiled, before
        return compiled

    def run(self: Any, inputs: Sequence[Any]) -> list[Tensor]:
        if id(self) not in graphs:
            raise _Compiled
        return list(graphs[id(self)][1](*inputs))

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        if parts is not None and next(met) not in parts:
            return graph
        _name_real_types(graph, inputs)
        compiled: Any = compile_fx.compile_fx(graph, inputs, inner_compile=compile_it)

        def call(*arguments: Any) -> Any:
            try:
                return compiled(*arguments)
            except _Compiled:
                return graph(*arguments)

        return call

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise RuntimeError("the compiler wants to try something out on the GPU, where others take times")

    with (
        mock.patch.object(CompiledFxGraph, "__call__", run),
        mock.patch.object(benchmarking.benchmarker, "benchmark_gpu", refuse),
    ):
        yield backend


def _name_real_types(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Annotates a graph's inputs as if they were real, since the annotations are part of what the caches go by."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        node.type = torch.nn.Parameter if isinstance(value, torch.nn.Parameter) else torch.Tensor
    graph.recompile()
