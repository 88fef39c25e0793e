"""On a GPU every Triton implementation gives the same results eagerly, compiled, and replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmmed.kernels.base import Call, Inputs, Op, Unavailable
from llmmed.kernels.catalog import get_implementation, get_op, implementation_names, load_kernels, op_names

pytestmark = pytest.mark.gpu

CANDIDATES = [(op, name) for op in op_names() for name in implementation_names(op) if name.startswith("triton")]
DEVICE = torch.device("cuda")


def load(op: str, name: str) -> Callable[..., Any]:
    try:
        return load_kernels({**dict.fromkeys(op_names(), "pytorch"), op: name}).functions[op]
    except Unavailable as reason:
        pytest.skip(str(reason))


def draw(op: Op, call: Call, seed: int) -> Inputs:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    inputs = op.make_inputs(call, op.regimes[0], generator, DEVICE)
    for leaf in leaves(op, inputs):
        leaf.requires_grad_()
    return inputs


def leaves(op: Op, inputs: Inputs) -> list[Tensor]:
    return [inputs[name] for name in op.differentiable if inputs[name] is not None]


def outputs_and_gradients(op: Op, function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    outputs = function(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not op.differentiable:
        return outputs
    gradients = torch.autograd.grad(outputs, leaves(op, inputs), [torch.ones_like(o) for o in outputs])
    return [*(o.detach() for o in outputs), *gradients]


def few_cases(op: Op) -> dict[str, Call]:
    """The first and the last: each is compiled for seconds."""
    cases = op.cases(torch.bfloat16)
    names = list(cases)
    return {name: cases[name] for name in dict.fromkeys((names[0], names[-1]))}


def assert_agree(expected: list[Tensor], found: list[Tensor], label: str) -> None:
    """By the norm: what a compiler fuses with a kernel may round otherwise, and one element may cancel."""
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        difference = (other.double() - one.double()).norm() / one.double().norm().clamp(min=1e-30)
        assert difference <= 1e-2, f"{label}: result {index} differs by {difference:.1e}"


@pytest.mark.parametrize(("op_name", "name"), CANDIDATES)
def test_compiled_equals_eager(op_name: str, name: str) -> None:
    op, function = get_op(op_name), load(op_name, name)
    for label, call in few_cases(op).items():
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        for seed in range(2):
            eager = outputs_and_gradients(op, function, draw(op, call, seed))
            again = outputs_and_gradients(op, compiled, draw(op, call, seed))
            assert_agree(eager, again, f"{label}, seed {seed}")


@pytest.mark.parametrize(("op_name", "name"), CANDIDATES)
def test_nothing_waits_for_the_host(op_name: str, name: str) -> None:
    op, function = get_op(op_name), load(op_name, name)
    for call in few_cases(op).values():
        inputs = draw(op, call, 0)
        outputs_and_gradients(op, function, inputs)  # what is compiled or looked up once may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs_and_gradients(op, function, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("op_name", "name"), CANDIDATES)
def test_graph_replayed_with_fresh_inputs_equals_eager(op_name: str, name: str) -> None:
    op, function = get_op(op_name), load(op_name, name)
    for label, call in few_cases(op).items():
        static = draw(op, call, 0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs_and_gradients(op, function, static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = outputs_and_gradients(op, function, static)
        for seed in (1, 2):
            fresh = draw(op, call, seed)
            with torch.no_grad():
                for argument, value in fresh.items():
                    if isinstance(value, Tensor):
                        static[argument].copy_(value)
            graph.replay()
            expected = outputs_and_gradients(op, function, fresh)
            if get_implementation(op_name, name).deterministic:
                assert all(map(torch.equal, captured, expected)), (label, seed)
            assert_agree(expected, captured, f"{label}, seed {seed}")
