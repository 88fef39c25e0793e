"""The workload: which calls of which ops a training step makes, recorded from the step itself.

The model runs once on the meta device, forward and backward, with a table whose functions write down their arguments.
No shape is stated by hand, and a new op needs no code here.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmmed.config import Config
from llmmed.files import sha256_of
from llmmed.kernels.base import Call, Kernels, TensorSpec
from llmmed.kernels.catalog import default_choice, get_implementation, get_op, load_kernels, with_uses
from llmmed.model.transformer import Transformer
from llmmed.optim import build_muon


@dataclass(frozen=True)
class Workload:
    """The calls of one micro-batch, forward pass and what backward recomputes, and how often each is made."""

    calls: Mapping[Call, int]

    def by_op(self) -> dict[str, dict[Call, int]]:
        """The calls of each op that the step uses, the ops sorted by name."""
        grouped: dict[str, dict[Call, int]] = {op: {} for op in sorted({call.op for call in self.calls})}
        for call, count in self.calls.items():
            grouped[call.op][call] = count
        return grouped

    def fingerprint(self) -> str:
        """A hash of calls and counts that does not depend on their order."""
        return sha256_of(sorted(json.dumps(entry, sort_keys=True) for entry in self.to_json()["calls"]))

    def to_json(self) -> dict[str, Any]:
        return {"calls": [{**call.to_json(), "count": count} for call, count in self.calls.items()]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Workload:
        return cls({Call.from_json(entry): entry["count"] for entry in data["calls"]})


def record_workload(config: Config) -> Workload:
    """What one micro-batch of the run and the optimizer's step call, at the run's shapes and in its compute dtype.

    Takes no memory and no device. What is recorded is the default plan's step: other implementations need not run on
    the meta device, and a Triton kernel would be launched there on no memory at all.
    """
    return record_calls(lambda recording: _step(config, recording), load_kernels(default_choice()))


def called_ops(config: Config, choice: Mapping[str, str]) -> set[str]:
    """The ops that the run's step calls under a plan: what the model and the optimizer call, and what those use.

    Runs none of the plan's implementations. An op that `choice` leaves out has its default.
    """
    return with_uses(_called(config, choice, _step), {**default_choice(), **choice})


def call_counts(config: Config, choice: Mapping[str, str]) -> dict[str, int]:
    """How often one micro-batch calls each op under a plan; the optimizer's ops are not among them, nor those that an
    implementation uses where PyTorch's does not."""
    return {op: sum(calls.values()) for op, calls in _called(config, choice, _micro_batch).items()}


def _called(
    config: Config, choice: Mapping[str, str], function: Callable[[Config, Kernels], object]
) -> dict[str, dict[Call, int]]:
    plan = {**default_choice(), **choice}
    table = load_kernels(default_choice())

    def parts_of(op: str) -> Collection[str]:
        return get_implementation(op, plan[op]).uses

    return record_calls(lambda recording: function(config, recording), table, parts_of=parts_of).by_op()


def _step(config: Config, kernels: Kernels) -> None:
    model = _micro_batch(config, kernels)
    if config.optimizer.name == "muon":
        build_muon(model, config.optimizer).step()


def _micro_batch(config: Config, kernels: Kernels) -> Transformer:
    """Forward and backward on the meta device; returns the model with its gradients."""
    train = config.train
    model = Transformer.for_training(config, kernels, "meta")
    tokens = torch.zeros(train.micro_batch_size, train.seq_len, dtype=torch.int64, device="meta")
    model(tokens, tokens, torch.ones((), device="meta")).backward()
    return model


def record_calls(
    function: Callable[[Kernels], object],
    kernels: Kernels,
    *,
    parts_of: Callable[[str], Collection[str]] | None = None,
) -> Workload:
    """Runs `function` with a table that computes what `kernels` computes and records every call.

    What is recorded is each call as it is made: activations that backward recomputes count again.

    Args:
        function: Takes the recording table.
        kernels: What computes.
        parts_of: Which of the ops that an op calls itself are recorded beside it; None for all.
    """
    counts: Counter[Call] = Counter()
    functions: dict[str, Callable[..., Any]] = {}
    recording = Kernels(functions, kernels.chosen)

    def inside(op: str) -> Kernels:
        """What an op is given to call."""
        if parts_of is None:
            return recording
        parts = parts_of(op)
        return Kernels({name: (functions if name in parts else kernels.functions)[name] for name in functions})

    for op, implementation in kernels.functions.items():
        functions[op] = _recorder(op, implementation, inside, counts)
    recording.__post_init__()
    function(recording)
    return Workload(dict(counts))


def _recorder(
    op: str, implementation: Callable[..., Any], inside: Callable[[str], Kernels], counts: Counter[Call]
) -> Callable[..., Any]:
    signature = inspect.signature(get_op(op).reference)
    calls_others = isinstance(implementation, functools.partial) and "kernels" in implementation.keywords

    def record(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments.items()
        counts[Call.of(op, **{n: TensorSpec.of(v) if isinstance(v, Tensor) else v for n, v in arguments})] += 1
        if calls_others:
            kwargs = {**kwargs, "kernels": inside(op)}
        return implementation(*args, **kwargs)

    return record
