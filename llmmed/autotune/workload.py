"""The workload: which calls of which ops a training step makes, recorded from the step itself.

The model runs once on the meta device, forward and backward, with a table whose functions write down their arguments.
No shape is stated by hand, and a new op needs no code here.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmmed.config import Config
from llmmed.files import sha256_of
from llmmed.kernels.base import Call, Kernels, TensorSpec
from llmmed.kernels.catalog import default_choice, get_op, load_kernels
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


def record_workload(config: Config, kernels: Kernels | None = None) -> Workload:
    """What one micro-batch of the run and the optimizer's step call, at the run's shapes and in its compute dtype.

    Takes no memory and no device. `kernels` are the default's unless given.
    """

    def step(recording: Kernels) -> None:
        model = _micro_batch(config, recording)
        if config.optimizer.name == "muon":
            build_muon(model, config.optimizer).step()

    return record_calls(step, kernels or load_kernels(default_choice()))


def record_micro_batch(config: Config) -> Workload:
    """What one micro-batch alone calls: `record_workload` without the optimizer."""
    return record_calls(lambda recording: _micro_batch(config, recording), load_kernels(default_choice()))


def _micro_batch(config: Config, kernels: Kernels) -> Transformer:
    """Forward and backward on the meta device; returns the model with its gradients."""
    train = config.train
    model = Transformer.for_training(config, kernels, "meta")
    tokens = torch.zeros(train.micro_batch_size, train.seq_len, dtype=torch.int64, device="meta")
    model(tokens, tokens, torch.ones((), device="meta")).backward()
    return model


def record_calls(function: Callable[[Kernels], object], kernels: Kernels) -> Workload:
    """Runs `function` with a table that computes what `kernels` computes and records every call.

    An op built from others calls those through the recording table too, so its parts are recorded beside it. What is
    recorded is each call as it is made: activations that backward recomputes count again.
    """
    counts: Counter[Call] = Counter()
    functions: dict[str, Callable[..., Any]] = {}
    recording = Kernels(functions, kernels.chosen)
    for op, implementation in kernels.functions.items():
        if isinstance(implementation, functools.partial) and "kernels" in implementation.keywords:
            implementation = functools.partial(implementation, kernels=recording)
        functions[op] = _recorder(op, implementation, counts)
    recording.__post_init__()
    function(recording)
    return Workload(dict(counts))


def _recorder(op: str, implementation: Callable[..., Any], counts: Counter[Call]) -> Callable[..., Any]:
    signature = inspect.signature(get_op(op).reference)

    def record(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments.items()
        counts[Call.of(op, **{n: TensorSpec.of(v) if isinstance(v, Tensor) else v for n, v in arguments})] += 1
        return implementation(*args, **kwargs)

    return record
