"""The faults of the one-file script that this project began with stay fixed.

It trained with wrong gradients, timed the forward pass alone in another dtype and shape, and chose RMSNorm and rotary
together.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from llmmed.autotune.choose import choose
from llmmed.autotune.measure import measure_op
from llmmed.autotune.plan import Candidate
from llmmed.autotune.workload import record_workload
from llmmed.compose import compose
from llmmed.kernels.base import Unavailable
from llmmed.kernels.catalog import default_choice, get_implementation, get_op, implementation_names, load_kernels
from llmmed.model import Transformer, compute_dtype

CHOICES = [
    {op: name}
    for op in ("rms_norm", "rotary", "rotary_attention")
    for name in implementation_names(op)
    if name not in ("liger", "compiled")
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(
    "mark", [pytest.param("", id="cpu"), pytest.param("", marks=pytest.mark.interpreter, id="interpreter")]
)
def test_gradients_reach_queries_keys_and_every_norm(choice: dict[str, str], mark: str) -> None:
    config = compose(["experiment=smoke", "data=synthetic", "device=cpu"])
    try:
        kernels = load_kernels(default_choice() | choice)
    except Unavailable as reason:
        pytest.skip(str(reason))
    model = Transformer(config.model, kernels, torch.float32, max_seq_len=16)
    tokens = torch.randint(config.model.vocab_size, (2, 16))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    rows = config.model.d_model
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        parts = parameter.grad.split(rows) if name.endswith("qkv_projection") else [parameter.grad]
        assert all(part.abs().sum() > 0 for part in parts), name  # queries, keys and values each


def test_timing_includes_backward() -> None:
    op = get_op("rms_norm")
    call = next(iter(op.cases(torch.float32).values()))
    function = get_implementation("rms_norm", "pytorch").load()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            time.sleep(0.005)
            return gradient

    def slow_backward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result: Tensor = Slow.apply(function(x, weight, eps))
        return result

    found = measure_op(
        op,
        {"pytorch": function, "slow": slow_backward},
        {call: 1},
        device=torch.device("cpu"),
        mode="eager",
        ceilings=None,
        turn=lambda name: None,
        failed=lambda name, error: pytest.fail(f"{name}: {error}"),
    )
    assert found["slow"].backward_ms >= 5
    assert found["slow"].total_ms >= 5
    assert found["slow"].forward_ms < 5
    assert found["pytorch"].total_ms < found["slow"].total_ms


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_timing_is_in_the_dtype_and_shapes_of_the_run(precision: str) -> None:
    sizes = ["train.seq_len=48", "train.micro_batch_size=3", f"train.precision={precision}"]
    calls = record_workload(compose(["experiment=smoke", "data=synthetic", *sizes])).by_op()
    for call in calls["rms_norm"]:
        assert call.spec("x").shape == (3, 48, 64)
        assert call.spec("x").dtype == compute_dtype(precision)
        assert call.spec("x").requires_grad
    for call in calls["rotary"]:
        assert call.spec("q").shape == (3, 48, 4, 16)
        assert call.spec("q").dtype == compute_dtype(precision)


def test_the_choices_are_independent() -> None:
    def timed(ms: float) -> Candidate:
        return Candidate(status="verified", total_ms=ms, total_ms_low=ms * 0.99, total_ms_high=ms * 1.01)

    fast_triton = {"pytorch": timed(2.0), "triton": timed(1.0)}
    slow_triton = {"pytorch": timed(1.0), "triton": timed(2.0)}
    assert choose("rms_norm", fast_triton, 0.01).chosen == "triton"
    assert choose("rotary", slow_triton, 0.01).chosen == "pytorch"
    assert choose("rms_norm", slow_triton, 0.01).chosen == "pytorch"
    assert choose("rotary", fast_triton, 0.01).chosen == "triton"
