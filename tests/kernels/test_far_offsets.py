"""Elements more than 2^31 away from the first: offsets must be computed in 64 bits before anything is multiplied.

In 32 bits they wrap, and a kernel reads or writes somewhere else. Such a test dies rather than fails. Without a GPU,
inputs and arriving gradients have rows far apart; on one, results have as many elements as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmmed.autotune.judge import Truth, judge
from llmmed.kernels.base import Call, Inputs, Op, TensorSpec, tensor_spec
from llmmed.kernels.catalog import get_implementation, get_op, implementation_names, load_function, op_names

BOUNDARY = 2**31
FAR = 2**30 + 64  # elements between two rows of which there are three
GPU_BYTES = 44 * 2**30  # what the largest of these tests take, and a little
TRITON = [(op, name) for op in op_names() for name in implementation_names(op) if name.startswith("triton")]


def _apart(spec: TensorSpec, dimension: int) -> TensorSpec:
    """The same tensor with its three entries along one dimension far from each other in memory."""
    assert spec.shape[dimension] == 3
    return replace(spec, stride=(*spec.stride[:dimension], FAR, *spec.stride[dimension + 1 :]))


def far_calls(op: str, dtype: torch.dtype) -> dict[str, tuple[Call, int]]:
    """Calls with three rows (sequences, positions), and the dimension that runs over them; without far strides yet."""

    def states(*shape: int) -> TensorSpec:
        return tensor_spec(*shape, dtype=dtype, requires_grad=True)

    weight = tensor_spec(32, dtype=torch.float32, requires_grad=True)
    targets = tensor_spec(3, dtype=torch.int64)
    if op == "rms_norm":
        return {"rows": (Call.of(op, x=states(3, 32), weight=weight, eps=1e-6), 0)}
    if op == "add_rms_norm":
        return {"rows": (Call.of(op, x=states(3, 32), residual=states(3, 32), weight=weight, eps=1e-6), 0)}
    if op == "swiglu":
        fused = Call.of(op, gate=states(3, 64), up=None)
        return {
            "rows": (Call.of(op, gate=states(3, 32), up=states(3, 32)), 0),
            "rows of a fused projection": (fused, 0),
        }
    if op == "cross_entropy":
        return {"rows": (Call.of(op, logits=states(3, 32), targets=targets, ignore_index=-100, scale=None), 0)}
    if op in ("rotary", "attention"):
        found = {}
        for name, dimension, shape in (("sequences", 0, (3, 2)), ("positions", 1, (1, 3)), ("heads", 2, (1, 2))):
            heads = 3 if dimension == 2 else 2
            arguments = {n: states(*shape, heads, 16) for n in ("q", "k", "v")[: 2 if op == "rotary" else 3]}
            if op == "rotary":
                arguments |= dict.fromkeys(("cos", "sin"), tensor_spec(shape[1], 8, dtype=torch.float32))
            found[name] = (Call.of(op, **arguments), dimension)
        return found
    return {}  # matrix products and their own buffers lie between the caller's memory and these kernels


CALLS = [(op, name, rows) for op, name in TRITON for rows in far_calls(op, torch.float32)]


def results(op: Op, function: Callable[..., Any], inputs: Inputs, far: Callable[[Tensor], Tensor]) -> list[Tensor]:
    leaves = [inputs[name].requires_grad_() for name in op.differentiable if inputs[name] is not None]
    outputs = function(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    arriving = [far(torch.randn(o.shape, generator=generator).to(o)) if o.ndim else torch.ones_like(o) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, arriving)]


def assert_distance_changes_nothing(op_name: str, name: str, rows: str, dtype: torch.dtype, device: str) -> None:
    op, function = get_op(op_name), load_function(op_name, get_implementation(op_name, name))
    call, dimension = far_calls(op_name, dtype)[rows]
    inputs = op.make_inputs(call, op.regimes[0], torch.Generator(device).manual_seed(0), torch.device(device))

    def far(tensor: Tensor) -> Tensor:
        # Memory that nobody touches is never backed: on a CPU three rows 4 GiB apart take three pages.
        return _apart(TensorSpec.of(tensor), dimension).like(tensor.detach())

    apart = {n: far(v) if isinstance(v, Tensor) and call.spec(n).requires_grad and v.ndim > 1 else v
             for n, v in inputs.items()}  # fmt: skip
    assert any(v.stride(dimension) == FAR for v in apart.values() if isinstance(v, Tensor) and v.ndim > dimension)
    expected = results(op, function, inputs, lambda upstream: upstream)
    found = results(op, function, apart, far)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01, msg=lambda m, n=number: f"result {n}: {m}")


@pytest.mark.interpreter
@pytest.mark.parametrize(("op", "name", "rows"), CALLS)
def test_rows_far_apart_in_memory(op: str, name: str, rows: str) -> None:
    assert_distance_changes_nothing(op, name, rows, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "name", "rows"), CALLS)
def test_rows_far_apart_in_a_gpus_memory(op: str, name: str, rows: str) -> None:
    need_memory()
    assert_distance_changes_nothing(op, name, rows, torch.bfloat16, "cuda")


def test_too_many_sequences_for_a_grid_are_refused() -> None:
    from llmmed.kernels.attention.triton_impl import attention

    states = torch.zeros(1, 1, 1, 16).expand(2**15, 2, 2, 16)
    with pytest.raises(ValueError, match="batch times heads is 65536, over 65535"):
        attention(states, states, states)


def call_of_rows(op: str, dtype: torch.dtype, rows: int, row: tuple[int, ...], classes: int = 512) -> Call:
    """A call over `rows` rows (sequences, matrices), each of the shape `row`."""

    def states() -> TensorSpec:
        return tensor_spec(rows, *row, dtype=dtype, requires_grad=op != "newton_schulz")

    def parameter(*shape: int) -> TensorSpec:
        return tensor_spec(*shape, dtype=torch.float32, requires_grad=True)

    targets = tensor_spec(rows, dtype=torch.int64)
    if op == "rms_norm":
        return Call.of(op, x=states(), weight=parameter(*row), eps=1e-6)
    if op == "add_rms_norm":
        return Call.of(op, x=states(), residual=states(), weight=parameter(*row), eps=1e-6)
    if op == "swiglu":
        return Call.of(op, gate=states(), up=states())
    if op == "swiglu_mlp":
        weights = tensor_spec(2 * classes, *row, dtype=dtype, requires_grad=True)
        down = tensor_spec(*row, classes, dtype=dtype, requires_grad=True)
        return Call.of(op, x=states(), gate_up_weight=weights, down_weight=down)
    if op == "rotary":
        table = tensor_spec(row[0], row[2] // 2, dtype=torch.float32)
        return Call.of(op, q=states(), k=states(), cos=table, sin=table)
    if op == "rotary_attention":
        table = tensor_spec(row[0], row[2] // 2, dtype=torch.float32)
        return Call.of(op, qkv=states(), cos=table, sin=table, n_heads=row[1] // 2)
    if op == "attention":
        return Call.of(op, q=states(), k=states(), v=states())
    if op == "cross_entropy":
        return Call.of(op, logits=states(), targets=targets, ignore_index=-100, scale=None)
    if op == "linear_cross_entropy":
        weight = parameter(classes, *row)
        return Call.of(op, hidden_states=states(), weight=weight, targets=targets, ignore_index=-100, scale=None)
    assert op == "newton_schulz", f"say here how a large call of '{op}' looks"
    return Call.of(op, G=states())


# A row of these shapes has a power of two of elements, so that the boundary lies between two.
LARGE_ROWS = {"rotary": (64, 8, 64), "attention": (1024, 4, 64), "newton_schulz": (256, 256), "cross_entropy": (2**15,)}
LARGE_ROWS["rotary_attention"] = LARGE_ROWS["attention"]
SMALL_ROWS = {"rotary": (4, 2, 16), "attention": (4, 2, 16), "rotary_attention": (4, 4, 16), "newton_schulz": (16, 24)}


@pytest.mark.gpu
@pytest.mark.parametrize(("op_name", "name"), TRITON)
def test_both_sides_of_the_boundary(op_name: str, name: str) -> None:
    need_memory()
    row = LARGE_ROWS.get(op_name, (2048,))
    call = call_of_rows(op_name, torch.bfloat16, BOUNDARY // math.prod(row) + 3, row)
    assert_right_around_the_boundary(op_name, name, call, BOUNDARY, "cuda")


@pytest.mark.interpreter
@pytest.mark.parametrize(("op_name", "name"), TRITON)
def test_a_few_rows_stand_for_all(op_name: str, name: str) -> None:
    """The same comparison where it is cheap: around a boundary that means nothing, in float32."""
    row = SMALL_ROWS.get(op_name, (48,))
    call = call_of_rows(op_name, torch.float32, 12, row, classes=30)
    assert_right_around_the_boundary(op_name, name, call, 6 * math.prod(row), "cpu")


def assert_right_around_the_boundary(op_name: str, name: str, call: Call, boundary: int, device: str) -> None:
    """Only a few rows count: gradients arrive at these alone, or all other targets are ignored. So the truth of these
    rows is the truth of a call with nothing but them, and a gradient that is summed over rows is theirs."""
    op, function = get_op(op_name), load_function(op_name, get_implementation(op_name, name))
    first = next(iter(call.tensors.values()))
    n_rows, row = first.shape[0], boundary // (first.numel // first.shape[0])
    few = torch.tensor(sorted({0, row - 1, row, n_rows - 1}), device=device)
    generator = torch.Generator(device).manual_seed(0)
    inputs = op.make_inputs(call, op.regimes[0], generator, torch.device(device))
    if device == "cuda":
        torch.cuda.empty_cache()  # values are drawn in float32
    if "targets" in inputs:
        counting = torch.full_like(inputs["targets"], inputs["ignore_index"])
        counting[few] = inputs["targets"][few]
        inputs["targets"] = counting

    def of_few(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach()[few] if value.ndim and value.shape[0] == n_rows else value.detach()

    def run(function: Callable[..., Any], inputs: Inputs, arriving: list[Tensor]) -> dict[str, Tensor]:
        asking = [n for n in op.differentiable if inputs[n] is not None]
        arguments = inputs | {n: inputs[n].detach().requires_grad_() for n in asking}
        outputs = as_list(function(**arguments))
        gradients = torch.autograd.grad(outputs, [arguments[n] for n in asking], arriving) if asking else ()
        found = {f"output {number}": of_few(output) for number, output in enumerate(outputs)}
        return found | {f"gradient of {n}": of_few(g) for n, g in zip(asking, gradients, strict=True)}

    small = {n: of_few(value) for n, value in inputs.items()}
    default = load_function(op_name, get_implementation(op_name, "pytorch"))
    drawn = [
        torch.randn(output.shape, generator=generator, device=device).to(output)
        if output.ndim
        else torch.ones_like(output)
        for output in as_list(default(**small))
    ]
    base = run(default, small, drawn)
    doubles = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in small.items()}
    truth = run(op.reference, doubles, [upstream.double() for upstream in drawn])

    def everywhere(upstream: Tensor) -> Tensor:
        if not upstream.ndim:
            return upstream
        return upstream.new_zeros((n_rows, *upstream.shape[1:])).index_copy_(0, few, upstream)

    found = run(function, inputs, [everywhere(upstream) for upstream in drawn])
    assert found.keys() == truth.keys()
    for label, value in found.items():
        finding, _ = judge(label, Truth(truth[label], base[label], 1.0, {}), value, call.compute_dtype)
        assert finding.ratio <= 1, finding.message


def as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def need_memory() -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < GPU_BYTES:
        pytest.skip(f"needs {GPU_BYTES / 2**30:.0f} GiB of a GPU's memory, and {free / 2**30:.0f} are free")
