"""Triton kernels at shapes and strides that nobody thought of; and a mistake of such shapes alone is found there."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmmed.autotune.verify import Verdict, verify
from llmmed.kernels.base import Call, Op
from llmmed.kernels.catalog import get_implementation, get_op, implementation_names, load_function, op_names
from llmmed.kernels.rms_norm.pytorch import rms_norm
from llmmed.reporting import verdict_worker
from llmmed.reporting.verdict_worker import at_random

CPU, FLOAT32 = torch.device("cpu"), torch.float32
TRITON = [(op, name) for op in op_names() for name in implementation_names(op) if name.startswith("triton")]


@pytest.mark.interpreter
@pytest.mark.parametrize(("op_name", "name"), TRITON)
def test_triton_kernels_are_right(op_name: str, name: str) -> None:
    op, implementation = get_op(op_name), get_implementation(op_name, name)
    function = load_function(op_name, implementation)
    found = [(v.status, v.reason) for v in at_random(op, implementation, function, FLOAT32, CPU, shapes=6)]
    assert found == 6 * [("verified", "")]


def wrong_by(amount: float) -> Callable[..., Tensor]:
    """The gradient of rms_norm's weight, in widths one short of a multiple of four, as none of its cases has."""

    class Doctored(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * (1 + amount)

    def function(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, Doctored.apply(weight) if x.shape[-1] % 4 == 3 else weight, eps)

    return function


def judged(function: Callable[..., Tensor]) -> list[str]:
    op, implementation = get_op("rms_norm"), get_implementation("rms_norm", "pytorch")
    implementation = replace(implementation, name="doctored")
    assert verify(op, implementation, function, [], CPU, dtype=FLOAT32).status == "verified"
    return [f"{v.status} {v.reason}" for v in at_random(op, implementation, function, FLOAT32, CPU, shapes=12)]


def test_what_is_wrong_at_some_shapes_only_is_found() -> None:
    reasons = [reason for reason in judged(wrong_by(0.02)) if reason != "verified "]
    assert reasons
    assert all(reason.startswith("wrong gradient of weight") and "(a random x " in reason for reason in reasons)


def test_what_chance_explains_is_no_mistake() -> None:
    """In float32 so little is beyond what the gate allows of a run's own calls, where more values make up for it."""
    amount = 1.5 * 64 * 2**-24
    assert set(judged(wrong_by(amount))) == {"verified "}
    op, call = get_op("rms_norm"), one_short()
    verdict = verify(op, get_implementation("rms_norm", "pytorch"), wrong_by(2 * amount), [call], CPU, cases=())
    assert verdict.status == "wrong"


@pytest.mark.parametrize(
    ("dtype", "ratio", "status"),
    [(FLOAT32, 8.0, "verified"), (FLOAT32, 8.1, "wrong"), (FLOAT32, math.inf, "wrong"), (FLOAT32, None, "wrong"),
     (torch.bfloat16, 1.1, "wrong")],
)  # fmt: skip
def test_chance_explains_little_and_in_float32_alone(
    dtype: torch.dtype, ratio: float | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Call] = []

    def say(
        op: Op, implementation: object, function: object, calls: list[Call], *rest: object, **how: object
    ) -> Verdict:
        tried.extend(calls)
        return Verdict("wrong", "it is", 1.0, ratio, 1)

    monkeypatch.setattr(verdict_worker, "verify", say)
    op, implementation = get_op("rms_norm"), get_implementation("rms_norm", "pytorch")
    assert [v.status for v in at_random(op, implementation, rms_norm, dtype, CPU, shapes=5)] == 5 * [status]
    # What is compiled for seconds at each shape is tried at three.
    slow = replace(implementation, per_shape=True)
    assert len(list(at_random(op, slow, rms_norm, dtype, CPU, shapes=5))) == 3
    assert tried[5:] == tried[:3]  # the same ones every time


def one_short() -> Call:
    op, dice = get_op("rms_norm"), random.Random(0)
    assert op.draw is not None
    return next(call for call in iter(lambda: op.draw(dice, FLOAT32), None) if call.spec("x").shape[-1] % 4 == 3)  # type: ignore[misc]


@pytest.mark.parametrize("op_name", op_names())
def test_shapes_and_strides_differ_and_come_again(op_name: str) -> None:
    op = get_op(op_name)

    def draw(op: Op, dtype: torch.dtype) -> list[Call]:
        assert op.draw is not None
        dice = random.Random(0)
        return [op.draw(dice, dtype) for _ in range(50)]

    calls = draw(op, torch.bfloat16)
    assert len(set(calls)) > 45
    assert calls == draw(op, torch.bfloat16)
    assert {call.compute_dtype for call in calls} == {torch.bfloat16}
    assert all(value.numel < 2**20 for call in calls for value in call.tensors.values())
    specs = [spec for call in calls for spec in call.tensors.values()]
    strided = [spec for spec in specs if spec.stride != spec.empty("meta").contiguous().stride()]
    assert len(strided) < len(specs) / 2
    always_dense = ("attention", "newton_schulz", "rotary")
    assert any(spec.stride[-1] == 1 for spec in strided) == (op_name not in always_dense)  # rows of a wider tensor
    transposed = any(spec.stride[-1] != 1 for spec in strided)
    assert transposed == (op_name not in (*always_dense, "rotary_attention"))
