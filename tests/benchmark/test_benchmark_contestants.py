"""All contestants train the same, each at its best, and the profiler finds the parts of their steps."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llmmed.benchmark import plain_llama
from llmmed.benchmark.contestants import CONTESTANTS, _Ours, build
from llmmed.benchmark.profiled_groups import group_events, in_range, largest_kernels
from llmmed.benchmark.settings import compose_benchmark
from llmmed.kernels.base import Kernels
from llmmed.kernels.catalog import default_choice, load_kernels
from tests.benchmark.samples import TINY


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_all_contestants_train_the_same(optimizer: str) -> None:
    wanted = [*TINY, f"optimizer={optimizer}", "model.n_kv_heads=2", "optimizer.schedule=constant",
              "optimizer.warmup_steps=0", "train.global_batch_tokens=64"]  # fmt: skip
    tokens = torch.randint(300, (2, 2, 17), generator=torch.Generator().manual_seed(0))
    found = {}
    for contestant in CONTESTANTS:
        if contestant.name not in ("ours_eager", "plain_eager", "hf_eager", "plain_compiled_torch"):
            continue
        if contestant.why_not("cpu"):
            continue  # transformers is not installed, or torch is too old
        contestant = replace(contestant, mode="eager")  # what is compiled computes the same, later
        _, config = compose_benchmark(own=[*wanted, *contestant.overrides])
        trainee = build(contestant, config)
        found[contestant.name] = [tuple(x.item() for x in trainee.step(i, list(tokens))) for i in range(2)]
    first, second = ([found[name][step] for name in found] for step in (0, 1))
    for values in first:
        assert values == pytest.approx(first[0], rel=1e-4)
    # Muon orthogonalises a rival's fused projections as the one matrix that they are to it.
    for values in second:
        assert values == pytest.approx(second[0], rel=1e-4 if optimizer == "adamw" else 0.02)
    assert second[0][0] < first[0][0]


def test_ours_gets_its_kernels_back_from_a_profiler_that_fails() -> None:
    kernels = load_kernels(default_choice())
    set_to: list[Kernels] = []
    ours = object.__new__(_Ours)
    ours._mode, ours._model = "eager", types.SimpleNamespace(kernels=kernels, set_kernels=set_to.append)  # type: ignore[assignment]
    with pytest.raises(RuntimeError), ours.annotated():
        raise RuntimeError
    assert len(set_to) == 2
    assert set_to[-1] is kernels


def test_hugging_face_is_causal_without_a_mask() -> None:
    masks = pytest.importorskip("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    before = masks["sdpa"]
    contestant = next(each for each in CONTESTANTS if each.name == "hf_compiled")
    _, config = compose_benchmark([*TINY, "model.n_layers=1", "benchmark=step"])
    found: list[dict[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        found.extend(node.kwargs for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph.forward

    try:
        trainee = build(contestant, config)
        tokens = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
        model = trainee._model  # type: ignore[attr-defined]
        loss = torch.compile(model, backend=backend)(tokens, tokens)
    finally:
        masks["sdpa"] = before
    assert [(kwargs["is_causal"], kwargs["attn_mask"]) for kwargs in found] == [(True, None)]
    assert loss.item() == pytest.approx(model(tokens, tokens).item(), rel=1e-6)  # as transformers masks by itself


def test_liger_sums_the_heads_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class LigerFusedLinearCrossEntropyFunction:
        @staticmethod
        def forward(
            ctx,
            _input,
            weight,
            target,
            bias=None,
            ce_weight=None,
            ignore_index=-100,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="mean",
            softcap=None,
            return_z_loss=False,
            accum_dtype=None,
        ):
            """As liger-kernel 0.8.5 has it."""

        @classmethod
        def apply(cls, *arguments: Any) -> tuple[torch.Tensor]:
            given.append(inspect.signature(cls.forward).bind(None, *arguments).arguments)
            return (torch.zeros(()),)

    module = types.ModuleType("fused")
    module.LigerFusedLinearCrossEntropyFunction = LigerFusedLinearCrossEntropyFunction  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", module)
    plain_llama._liger_loss(torch.nn.Linear(4, 8, bias=False), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    assert given[0]["accum_dtype"] == torch.float32
    assert (given[0]["ignore_index"], given[0]["reduction"]) == (-100, "mean")


def test_backward_counts_where_forward_stood() -> None:
    def part(x: torch.Tensor) -> torch.Tensor:
        return torch.cos(x * x)

    x = torch.randn(1000, 1000, requires_grad=True)
    wrapped = in_range(part, "rotary")

    def times(function: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            (F.silu(function(x)) @ x).exp().sum().backward()
        return group_events(list(profiler.events()), on_gpu=False)

    plain = times(part)
    assert "rotary" not in plain
    assert plain["swiglu"] > 0  # told by the operator's name
    assert plain["products"] > plain["swiglu"]

    def forward_alone() -> float:
        with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
            wrapped(x)
        return group_events(list(profiler.events()), on_gpu=False)["rotary"]

    # The fastest of a few: a busy machine makes any of them slow.
    assert min(times(wrapped)["rotary"] for _ in range(3)) > 1.5 * min(forward_alone() for _ in range(5))


def test_a_group_takes_no_longer_than_its_kernels_did() -> None:
    """A launcher may be told of a kernel more than once, and a graph's are launched by nobody."""

    def event(name: str, kind: DeviceType, took: float = 0.0, kernels: Sequence[object] = ()) -> Any:
        return types.SimpleNamespace(
            name=name, device_type=kind, self_device_time_total=took, kernels=kernels, is_user_annotation=False,
            cpu_parent=None, sequence_nr=-1, fwd_thread=None, time_range=types.SimpleNamespace(start=0.0),
        )  # fmt: skip

    adam = types.SimpleNamespace(name="multi_tensor_apply_kernel", duration=10.0)
    copy = types.SimpleNamespace(name="copy_kernel", duration=4.0)
    muon = types.SimpleNamespace(name="muon_kernel", duration=5.0)
    events = [
        *(event(adam.name, DeviceType.CUDA, 10.0) for _ in range(2)),
        *(event(copy.name, DeviceType.CUDA, 4.0) for _ in range(2)),
        *(event("muon_kernel", DeviceType.CUDA, 5.0) for _ in range(2)),
        event("void cudnn::fusion::convert_dq_to_16bits<true>(void const*)", DeviceType.CUDA, 3.0),
        event("Optimizer.step#AdamW.step", DeviceType.CPU, kernels=[adam, adam, copy, muon]),
        event("aten::_fused_adamw_", DeviceType.CPU, kernels=[adam, adam, adam, adam]),
        event("aten::silu", DeviceType.CPU, kernels=[copy]),
        event("aten::silu", DeviceType.CPU, kernels=[copy]),
    ]
    found = group_events(events, on_gpu=True)
    # Both copies are silu's, whatever the range tells; of Muon's kernels one was launched by nobody.
    assert found == pytest.approx({"optimizer": 30.0, "swiglu": 8.0, "attention": 3.0, "other": 0.0})
    cudnn = ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*)", 3.0)
    assert list(largest_kernels(events).items()) == [(adam.name, 20.0), ("muon_kernel", 10.0), (copy.name, 8.0), cudnn]
