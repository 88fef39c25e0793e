"""Compiling ahead without running: the caches take what it leaves for what the real step compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._functorch._aot_autograd import autograd_cache
from torch._inductor import compile_fx
from torch._inductor.fx_passes import pad_mm
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.runtime import benchmarking

from llmmed.autotune.compiled_ahead import compile_ahead, compile_update_ahead
from llmmed.autotune.step_clock import StepClock
from llmmed.compose import compose
from llmmed.config import Config
from llmmed.kernels.ahead_of_time import TARGETS
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.kernels.operator import INTERPRETED, absent_gpu
from llmmed.model import Transformer
from llmmed.optim import fusing
from llmmed.training.copies import keep_copies
from llmmed.training.micro_step import LaunchedMicroStep
from llmmed.training.step import Stepper

CHOICE = {**default_choice(), "linear_cross_entropy": "triton", "swiglu": "triton"}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the caches go by, of each graph that is compiled, forward and backward together."""
    found: list[str] = []
    real = autograd_cache.autograd_cache_key

    def key(*arguments: Any, **options: Any) -> Any:
        answer = real(*arguments, **options)
        found.append(answer[0])
        return answer

    monkeypatch.setattr(autograd_cache, "autograd_cache_key", key)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def without_kernels(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
    """Stands for the part of Inductor that writes and compiles kernels."""

    def run(arguments: list[Tensor]) -> Any:
        return graph(*arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_compiled_ahead_is_what_the_step_compiles(
    tiny: Config, keys: list[str], monkeypatch: pytest.MonkeyPatch, precision: Literal["fp32", "bf16"]
) -> None:
    config = replace(tiny, train=replace(tiny.train, compile="compiled", precision=precision))
    # As with graphs, which a CPU does not have.
    monkeypatch.setattr("llmmed.training.copies.wanted", lambda config, mode: mode == "compiled")

    def refused(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        """As where a product's shape is odd; but nothing may be tried out beside those who take times."""
        with pytest.raises(RuntimeError, match="wants to try something out"):
            pad_mm.get_do_bench()(lambda: None)
        return without_kernels(graph, inputs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", refused)
    compile_ahead(config, default_choice(), "compiled", [0, 2])
    compile_ahead(config, default_choice(), "compiled", [1])  # perhaps by another process
    ahead = list(keys)
    assert len(set(ahead)) == 3  # embedding, block, loss
    assert "benchmark_gpu" not in vars(benchmarking.benchmarker)
    keys.clear()
    torch._dynamo.reset()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=without_kernels)  # type: ignore[arg-type]

    parts = Transformer.compile_parts
    monkeypatch.setattr(Transformer, "compile_parts", lambda model: parts(model, backend))
    StepClock(config, "compiled")._subject(default_choice())
    assert sorted(keys) == sorted(ahead)


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "adamw"), ("bf16", "muon")])
def test_the_update_is_compiled_ahead_as_the_optimizer_compiles_it(
    tiny: Config,
    keys: list[str],
    monkeypatch: pytest.MonkeyPatch,
    precision: Literal["fp32", "bf16"],
    optimizer: str,
) -> None:
    """For two layers, of which it has seen one."""
    updates = compose([f"optimizer={optimizer}"]).optimizer
    config = replace(tiny, train=replace(tiny.train, precision=precision), optimizer=updates)
    assert config.model.n_layers > 1
    monkeypatch.setattr("llmmed.training.copies.wanted", lambda config, mode: mode == "graphs")
    for module in ("adamw", "muon"):
        monkeypatch.setattr(f"llmmed.optim.{module}.fused", lambda function, where: fusing.compiled(function))
    monkeypatch.setattr(compile_fx, "compile_fx_inner", without_kernels)
    compile_update_ahead(config, "graphs")
    ahead = list(keys)
    keys.clear()
    torch._dynamo.reset()
    model = Transformer.for_training(config, load_kernels(default_choice()), "cpu")
    keep_copies(model, config, "graphs")
    tokens = torch.zeros((config.train.micro_batch_size, config.train.seq_len + 1), dtype=torch.int64)
    Stepper(model, LaunchedMicroStep(model, model.leaves), config).run(0, [tokens], 1)
    if optimizer == "muon":
        assert len(set(ahead)) == 2 * 4  # before and after the orthogonalisation, four projections
    else:
        assert len(set(ahead)) == (0 if precision == "fp32" else 6)  # what all have in common; the projections, a table
    assert sorted(keys) == sorted(ahead)


@pytest.mark.skipif(INTERPRETED, reason="in the interpreter they run here")
def test_kernels_that_cannot_run_here_are_compiled_around(
    tiny: Config, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, since neither is run."""
    backward: list[bool] = []

    def inner(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        backward.append(options.get("is_backward", False))
        return without_kernels(graph, inputs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", inner)
    with absent_gpu(TARGETS[90]):
        compile_ahead(tiny, CHOICE, "compiled")
    assert sorted(backward) == [False] * 3 + [True] * 3
    assert len(set(keys)) == 3


def test_what_is_in_the_caches_already_is_not_run(
    tiny: Config, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(CompiledFxGraph, "__del__", raising=False)
    found = object.__new__(CompiledFxGraph)  # as the caches give it

    def compiled(*arguments: Any, **options: Any) -> Callable[..., Any]:
        return lambda *inputs: found(inputs)

    monkeypatch.setattr(compile_fx, "compile_fx", compiled)
    compile_ahead(tiny, default_choice(), "compiled")
    assert not keys
