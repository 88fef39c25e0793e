"""The recorded workload: the right calls, the same as a real step makes, and a fingerprint that tells runs apart."""

from __future__ import annotations

import functools
import importlib
import json
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmmed.autotune.workload import (
    Workload,
    call_counts,
    called_ops,
    record_calls,
    record_workload,
)
from llmmed.compose import compose
from llmmed.config import Config
from llmmed.kernels.base import Call, Kernels, TensorSpec, tensor_spec
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer

LAYERS, WIDTH, HEADS, KV_HEADS, BATCH, SEQ = 3, 64, 4, 2, 2, 16
D_HEAD = WIDTH // HEADS


@pytest.fixture
def config() -> Config:
    return compose(
        [
            "experiment=smoke",
            "data=synthetic",
            "device=cpu",
            f"model.n_layers={LAYERS}",
            f"model.d_model={WIDTH}",
            f"model.n_heads={HEADS}",
            f"model.n_kv_heads={KV_HEADS}",
            "model.d_ff=96",
            "model.vocab_size=101",
            "model.norm_eps=1e-5",
            "model.tie_embeddings=true",
            f"train.seq_len={SEQ}",
            f"train.micro_batch_size={BATCH}",
            "train.precision=bf16",
        ]
    )


def test_records_every_call_with_its_layout(config: Config) -> None:
    calls = record_workload(config).by_op()
    assert calls["rms_norm"] == {
        Call.of(
            "rms_norm",
            x=tensor_spec(BATCH, SEQ, WIDTH, dtype=torch.bfloat16, requires_grad=True),
            weight=tensor_spec(WIDTH, dtype=torch.float32, requires_grad=True),
            eps=1e-5,
        ): 2 * LAYERS + 1
    }
    row = (HEADS + 2 * KV_HEADS) * D_HEAD  # q and k are views of one projection
    table = tensor_spec(SEQ, D_HEAD // 2, dtype=torch.float32)
    assert calls["rotary"] == {
        Call.of(
            "rotary",
            q=TensorSpec((BATCH, SEQ, HEADS, D_HEAD), torch.bfloat16, (SEQ * row, row, D_HEAD, 1), True),
            k=TensorSpec((BATCH, SEQ, KV_HEADS, D_HEAD), torch.bfloat16, (SEQ * row, row, D_HEAD, 1), True),
            cos=table,
            sin=table,
        ): LAYERS
    }
    qkv = tensor_spec(BATCH, SEQ, HEADS + 2 * KV_HEADS, D_HEAD, dtype=torch.bfloat16, requires_grad=True)
    assert calls["rotary_attention"] == {
        Call.of("rotary_attention", qkv=qkv, cos=table, sin=table, n_heads=HEADS): LAYERS
    }


def test_records_what_the_optimizer_orthogonalises(config: Config) -> None:
    muon = replace(config, optimizer=replace(config.optimizer, name="muon", momentum=0.95))
    calls = record_workload(muon).by_op()["newton_schulz"]
    shapes = [call.spec("G").shape for call in calls]
    matrices = LAYERS * 7  # queries, keys, values, output, gate, up, down
    assert sum(shape[0] for shape in shapes) == matrices
    assert all(rows <= cols for _, rows, cols in shapes)
    assert all(call.compute_dtype == torch.bfloat16 for call in calls)
    assert "newton_schulz" not in record_workload(config).by_op()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_a_real_step_calls_what_was_recorded(config: Config, checkpointing: str, precision: str, device: str) -> None:
    train = replace(config.train, precision=precision, activation_checkpointing=checkpointing)
    config = replace(config, train=train)

    def step(kernels: Kernels) -> None:
        model = Transformer.for_training(config, kernels, device)
        tokens = torch.randint(config.model.vocab_size, (BATCH, SEQ), device=device)
        model(tokens, tokens, torch.ones((), device=device)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    assert record_calls(step, load_kernels(default_choice())) == record_workload(config)


def test_checkpointed_blocks_are_recorded_twice(config: Config) -> None:
    plain = record_workload(config).calls
    checkpointed = record_workload(replace(config, train=replace(config.train, activation_checkpointing="block"))).calls
    assert checkpointed.keys() == plain.keys()
    outside = {"cross_entropy", "linear_cross_entropy"}  # beside the first norm, which no block holds
    for call, count in plain.items():
        if call.op == "rms_norm":
            assert (count, checkpointed[call]) == (2 * LAYERS + 1, 4 * LAYERS + 1)
        elif call.op == "add_rms_norm":
            assert (count, checkpointed[call]) == (2 * LAYERS, 4 * LAYERS)
        else:
            assert checkpointed[call] == (count if call.op in outside else 2 * count), call.op
    assert {call.op for call in plain} >= {"rotary_attention", "rotary", "attention", "swiglu"}


def test_the_fingerprint_tells_runs_apart(config: Config) -> None:
    def fingerprint(**change: object) -> str:
        return record_workload(replace(config, train=replace(config.train, **change))).fingerprint()

    base = fingerprint()
    deeper = record_workload(replace(config, model=replace(config.model, n_layers=LAYERS + 1))).fingerprint()
    changed = [fingerprint(micro_batch_size=BATCH + 1), fingerprint(seq_len=SEQ * 2), fingerprint(precision="fp32")]
    assert len({base, deeper, *changed}) == 5
    assert fingerprint(max_steps=9, log_every=3) == base


def test_the_fingerprint_does_not_depend_on_the_order(config: Config) -> None:
    workload = record_workload(config)
    backwards = Workload(dict(reversed(workload.calls.items())))
    assert list(backwards.calls) != list(workload.calls)
    assert backwards.fingerprint() == workload.fingerprint()


def test_survives_json(config: Config) -> None:
    workload = record_workload(config)
    back = Workload.from_json(json.loads(json.dumps(workload.to_json())))
    assert back == workload
    assert back.fingerprint() == workload.fingerprint()


def test_positional_and_named_arguments_are_one_call() -> None:
    x, weight = torch.ones(3, 8), torch.ones(8)

    def function(kernels: Kernels) -> None:
        first = kernels.rms_norm(x, weight, 1e-5)
        second = kernels.rms_norm(eps=1e-5, weight=weight, x=x)
        torch.testing.assert_close(first, torch.ones(3, 8))
        assert torch.equal(first, second)

    workload = record_calls(function, load_kernels(default_choice()))
    assert list(workload.calls.values()) == [2]


def test_recomputed_activations_count_again() -> None:
    x, weight = torch.ones(3, 8, requires_grad=True), torch.ones(8)

    def function(kernels: Kernels) -> None:
        checkpoint(kernels.rms_norm, x, weight, 1e-5, use_reentrant=False).sum().backward()

    assert list(record_calls(function, load_kernels(default_choice())).calls.values()) == [2]


def test_the_parts_of_a_coarse_op_are_recorded_beside_it() -> None:
    def normed_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        weight = torch.ones(q.shape[-1])
        return kernels.rms_norm(q, weight, 1e-5), kernels.rms_norm(k, weight, 1e-5)

    functions = dict(load_kernels({"rms_norm": "pytorch"}).functions)
    table = Kernels(functions)
    functions["rotary"] = functools.partial(normed_rotary, kernels=table)
    table.__post_init__()
    heads, angles = torch.ones(1, 2, 4, 8), torch.ones(2, 4)
    workload = record_calls(lambda kernels: kernels.rotary(heads, heads, angles, angles), table)
    assert {op: list(calls.values()) for op, calls in workload.by_op().items()} == {"rms_norm": [2], "rotary": [1]}


def test_a_large_model_is_recorded_at_once(config: Config) -> None:
    model = replace(config.model, n_layers=16, d_model=2048, n_heads=16, n_kv_heads=16, d_ff=5632, vocab_size=49_152)
    large = replace(config, model=model, train=replace(config.train, micro_batch_size=8, seq_len=2048))
    started = time.perf_counter()
    calls = record_workload(large).by_op()["rms_norm"]
    assert time.perf_counter() - started < 10  # under a second on an idle machine
    assert next(iter(calls)).spec("x").shape == (8, 2048, 2048)


def test_a_fused_implementation_leaves_its_parts_uncalled(config: Config) -> None:
    assert "rms_norm" in called_ops(config, {})
    assert {"cross_entropy", "linear_cross_entropy"} <= called_ops(config, {})
    fused = called_ops(config, {"linear_cross_entropy": "triton"})
    assert fused == called_ops(config, {}) - {"cross_entropy"}
    assert called_ops(config, {"linear_cross_entropy": "compiled"}) == called_ops(config, {})


def test_calls_are_counted_as_a_plan_makes_them(config: Config) -> None:
    default = call_counts(config, {})
    assert default == {op: sum(calls.values()) for op, calls in record_workload(config).by_op().items()}
    assert default["rms_norm"] == 2 * LAYERS + 1
    fused = call_counts(config, {"add_rms_norm": "triton"})
    assert fused == default | {"rms_norm": 1}
    assert call_counts(config, {"add_rms_norm": "compiled"}) == default
    no_parts = call_counts(config, {"rotary_attention": "triton", "swiglu_mlp": "triton"})
    assert no_parts == {op: n for op, n in default.items() if op not in ("rotary", "attention", "swiglu")}


def test_a_plan_calls_what_its_implementations_use_and_no_other_parts(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package's `rotary_attention` may do the rotation itself, and a norm beside."""
    module = importlib.import_module("llmmed.kernels.rotary_attention.triton_impl")
    monkeypatch.setattr(module, "IMPL", replace(module.IMPL, uses=("attention", "newton_schulz")))
    plan = {"rotary_attention": "triton"}
    assert called_ops(config, plan) == called_ops(config, {}) - {"rotary"} | {"newton_schulz"}
    assert call_counts(config, plan) == {op: n for op, n in call_counts(config, {}).items() if op != "rotary"}


def test_the_default_plan_calls_what_is_recorded(config: Config) -> None:
    muon = replace(config, optimizer=replace(config.optimizer, name="muon", momentum=0.95))
    for each in (config, muon):
        assert called_ops(each, default_choice()) == set(record_workload(each).by_op())


def test_what_a_plan_calls_is_known_without_running_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device a Triton kernel would be launched on no memory: an illegal access, and the process is lost."""
    for op in ("cross_entropy", "linear_cross_entropy", "rms_norm"):
        module = importlib.import_module(f"llmmed.kernels.{op}.triton_impl")
        monkeypatch.setattr(
            module, "IMPL", replace(module.IMPL, load=lambda: pytest.fail("an implementation was loaded"))
        )
    assert called_ops(config, {"rms_norm": "triton", "linear_cross_entropy": "triton", "cross_entropy": "triton"})
