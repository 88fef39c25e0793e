"""Triton implementations as PyTorch operators, in the interpreter: `opcheck` passes, and compiled equals eager."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmmed.kernels.base import Call, Inputs, Op
from llmmed.kernels.catalog import get_implementation, get_op, implementation_names, load_function, op_names
from llmmed.kernels.operator import make_operator

CANDIDATES = [(op, name) for op in op_names() for name in implementation_names(op) if name.startswith("triton")]
CPU = torch.device("cpu")
CHEAP = ("test_schema", "test_autograd_registration", "test_faketensor")  # of `opcheck`
LARGEST = 2**12  # elements of a tensor: `opcheck` runs an operator half a dozen times


@pytest.mark.interpreter
@pytest.mark.parametrize(("op_name", "name"), CANDIDATES)
def test_opcheck_passes_on_what_a_compiled_step_calls(op_name: str, name: str) -> None:
    op, function = get_op(op_name), load_function(op_name, get_implementation(op_name, name))
    checked: set[str] = set()
    for call in small_cases(op):
        recorder = _Recorder()
        # Eager mode goes round the operators; this is the road that a compiler takes.
        with mock.patch("torch.compiler._is_compiling_flag", True), recorder:
            outputs_and_gradients(op, function, draw(op, call))
        asking = [a for _, arguments in recorder.calls for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        assert bool(asking) == bool(op.differentiable)
        for operator, arguments in recorder.calls:
            # Through a compiler, which takes longest, once for each operator; the next test compiles every case.
            known = operator.name() in checked
            torch.library.opcheck(operator, arguments, test_utils=CHEAP if known else "ALL")
            checked.add(operator.name())
    expected = 2 if op.differentiable else 1
    assert len(checked) >= expected, checked


@pytest.mark.interpreter
@pytest.mark.parametrize(("op_name", "name"), CANDIDATES)
def test_compiled_without_graph_breaks_equals_eager(op_name: str, name: str) -> None:
    op, function = get_op(op_name), load_function(op_name, get_implementation(op_name, name))
    for call in small_cases(op):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
        expected = outputs_and_gradients(op, function, draw(op, call))
        found = outputs_and_gradients(op, compiled, draw(op, call))
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6, msg=lambda m, n=number: f"result {n}: {m}")


@pytest.mark.interpreter
@pytest.mark.parametrize(("op_name", "name"), [pair for pair in CANDIDATES if get_op(pair[0]).differentiable])
def test_a_second_derivative_is_refused(op_name: str, name: str) -> None:
    """Rather than taken for zero where the arguments have gradients by another way too."""
    op, function = get_op(op_name), load_function(op_name, get_implementation(op_name, name))
    inputs = draw(op, small_cases(op)[0])
    outputs = function(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    with pytest.raises(RuntimeError, match=f"{op_name}.*has no second derivative; use kernels=pytorch"):
        torch.autograd.grad(outputs, leaves(op, inputs), [torch.ones_like(o) for o in outputs], create_graph=True)


def test_a_compiler_does_not_write_out_the_arguments_of_an_operator() -> None:
    """Torch 2.11 does where it first meets one; in a deep model without an end (see `_shorten_compiler_messages`)."""
    from torch._inductor.exc import MissingOperatorWithoutDecomp

    class Deep:
        def __str__(self) -> str:
            pytest.fail("an argument was written out")

    operator, x = _squared_sum(), torch.ones(2, requires_grad=True)
    torch.compile(operator, fullgraph=True, backend="aot_eager")(x, x)
    assert "target: add" in MissingOperatorWithoutDecomp.operator_str("add", [Deep()], {})


def test_a_workload_is_recorded_under_any_plan_without_a_launch() -> None:
    operator = _squared_sum()
    x = torch.ones(2, device="meta", requires_grad=True)
    gradients = torch.autograd.grad(operator(x, x).sum(), [x])
    assert gradients[0].is_meta


@pytest.mark.interpreter
@pytest.mark.parametrize(("op_name", "name"), CANDIDATES)
def test_tensors_without_memory_launch_nothing(op_name: str, name: str) -> None:
    op, function = get_op(op_name), load_function(op_name, get_implementation(op_name, name))
    call = small_cases(op)[0]
    meta = {n: spec.empty("meta").requires_grad_(spec.requires_grad) for n, spec in call.tensors.items()}
    with mock.patch.object(triton.JITFunction, "run", side_effect=AssertionError("a kernel was launched")):
        assert all(result.is_meta for result in outputs_and_gradients(op, function, dict(call.arguments) | meta))
        with FakeTensorMode():
            fake = {n: spec.empty(CPU).requires_grad_(spec.requires_grad) for n, spec in call.tensors.items()}
            found = outputs_and_gradients(op, function, dict(call.arguments) | fake)
            assert all(isinstance(result, FakeTensor) for result in found)


@pytest.mark.parametrize(
    ("args", "kwargs", "told"),
    [
        ((), {"x": 1, "z": 2}, "missing a required argument: 'y'"),
        ((1, 2), {"z": 2}, "unexpected keyword argument 'z'"),
        ((1, 2), {"y": 2}, "multiple values for argument 'y'"),
        ((1, 2, 3), {}, "too many positional arguments"),
    ],
)
def test_arguments_that_an_operator_has_not_are_refused(args: Any, kwargs: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        _squared_sum()(*args, **kwargs)


def test_one_result_can_be_the_gradient_of_two_arguments() -> None:
    operator = _squared_sum()
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 5.0], requires_grad=True)
    torch.compiler.reset()
    for function in (operator, torch.compile(operator, fullgraph=True, backend="aot_eager")):
        dx, dy = torch.autograd.grad(function(x, y).sum(), (x, y))
        torch.testing.assert_close(dx, torch.tensor([8.0, 14.0]))
        torch.testing.assert_close(dy, torch.tensor([8.0, 14.0]))
    # One argument twice: its gradient is the sum of both.
    (dx,) = torch.autograd.grad(operator(x, x).sum(), x)
    torch.testing.assert_close(dx, torch.tensor([8.0, 16.0]))


@pytest.mark.interpreter
@pytest.mark.parametrize("op_name", ["swiglu", "rotary_attention"])
def test_a_compiled_projection_and_its_op_copy_no_gradients_together(op_name: str) -> None:
    function = load_function(op_name, get_implementation(op_name, "triton"))
    cos, sin = torch.rand(2, 5, 4)
    called: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def step(x: Tensor, weight: Tensor) -> Tensor:
        projected = torch.nn.functional.linear(x, weight)
        if op_name == "swiglu":
            return function(projected)
        return function(projected.view(2, 5, 4, 8), cos, sin, 2).flatten(2)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    compiled(x, weight).sum().backward()
    assert any(f"{op_name}_triton_backward" in name for name in called), called
    assert not [name for name in called if re.search(r"cat|copy|clone|slice_backward", name)], called


class _Recorder(TorchDispatchMode):
    """Keeps the calls of this project's operators, their arguments as leaves that ask for the same gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "llmmed":
            forward = not func.name().endswith("_backward")
            self.calls.append((func, tuple(_leaf(argument, forward) for argument in args)))
        return func(*args, **(kwargs or {}))


def _leaf(argument: Any, differentiable: bool) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    copy = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype).copy_(argument.detach())
    return copy.requires_grad_(differentiable and argument.requires_grad)


def small_cases(op: Op) -> list[Call]:
    return [
        call
        for call in op.cases(torch.float32).values()
        if max(spec.numel for spec in call.tensors.values()) <= LARGEST
    ]


def draw(op: Op, call: Call) -> Inputs:
    inputs = op.make_inputs(call, op.regimes[0], torch.Generator().manual_seed(0), CPU)
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
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, device=o.device) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves(op, inputs), upstream)
    return [*(output.detach() for output in outputs), *gradients]


def _square_of_sum(x: Tensor, y: Tensor) -> tuple[Tensor]:
    return ((x + y) ** 2,)


def _derivative(upstream: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor]:
    return (upstream * 2 * (x + y),)


def _squared_sum() -> Callable[..., Any]:
    return make_operator(
        "llmmed_test::square_of_sum",
        forward=_square_of_sum,
        fake_forward=lambda x, y: (torch.empty_like(x),),
        backward=_derivative,
        fake_backward=lambda upstream, x, y: (torch.empty_like(x),),
        save=lambda arguments, results: arguments,
        gradients=("x", "y"),
        spread=lambda gradient: (gradient, gradient),
    )
