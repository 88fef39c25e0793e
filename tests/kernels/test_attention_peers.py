"""Other people's attention: what is called and how, and why it is unavailable where it is."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from llmmed.autotune.verify import verify
from llmmed.kernels.attention import flex, reference
from llmmed.kernels.base import Unavailable
from llmmed.kernels.catalog import get_implementation, get_op, load_function
from llmmed.training.executed import compare

CPU = torch.device("cpu")
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
KERNELS = {  # as a profiler names them
    "flash": {"void pytorch_flash::flash_fwd_kernel<Traits, false, true>(pytorch_flash::Flash_fwd_params)"},
    "flash_attention_2": {"void flash::flash_fwd_kernel<Traits, false, true>(flash::Flash_fwd_params)"},
    "flash_attention_3": {
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::Mainloop>>>(Params)"
    },
    "flex": {"triton_tem_fused_flex_attention_2"},
}


@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())
def _(q: Tensor) -> Tensor:
    """Only there to be found, as in a build that a compiler can trace."""
    return q.clone()


def stand_in(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """What the packages' `flash_attn_func` computes, in their layout: [batch, seq, heads, head_dim]."""
    states = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*states, is_causal=causal, enable_gqa=True).transpose(1, 2)


def install(monkeypatch: pytest.MonkeyPatch, name: str, version: str = "2.8.3.post1") -> None:
    """A package with the stand-in, and a GPU as far as loading asks for one."""
    package = ModuleType(PACKAGES[name])
    package.__dict__.update(flash_attn_func=stand_in, __version__=version)
    monkeypatch.setitem(sys.modules, PACKAGES[name], package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(Unavailable, match=r"FlashAttention \d is not installed \(.*\); "):
        get_implementation("attention", name).load()


@pytest.mark.parametrize("version", ["2.7.4.post1", "1.0", ""])
def test_an_old_package_is_a_reason(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, "flash_attention_2", version)
    with pytest.raises(Unavailable, match=r"2\.8 or newer"):
        get_implementation("attention", "flash_attention_2").load()


def test_a_gpu_of_another_generation_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attention_3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    with pytest.raises(Unavailable, match="Hopper"):
        get_implementation("attention", "flash_attention_3").load()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(monkeypatch, name)
    implementation = get_implementation("attention", name)
    function = load_function("attention", implementation)
    verdict = verify(get_op("attention"), implementation, function, [], CPU, dtype=torch.bfloat16)
    assert verdict.status == "verified", verdict
    assert verdict.checks > 50


@pytest.mark.parametrize("name", KERNELS)
def test_a_trace_tells_one_from_another(name: str) -> None:
    for other, launched in KERNELS.items():
        expected = get_implementation("attention", name).kernel_names
        seen = [k for k in expected if any(re.search(rf"(?<![A-Za-z0-9_]){re.escape(k)}", n) for n in launched)]
        # PyTorch's copy of FlashAttention 2 has the kernels' own names.
        assert bool(seen) == (name == other or (name, other) == ("flash", "flash_attention_2")), (name, other)
    assert compare({"attention": name}, {"attention"}, KERNELS[name])["attention"].startswith("seen: ")


def test_flex_takes_one_mask_for_all_layers_and_graphs_as_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator runs on a CPU as plain mathematics; only PyTorch's function declines to train there."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *states: None)
    graphs: list[Counter[str]] = []
    inputs: list[set[int]] = []  # the addresses of what is no state

    def record(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))

        def run(*arguments: Tensor) -> Any:
            inputs.append({x.data_ptr() for x in arguments if not x.is_floating_point()})
            return graph(*arguments)

        return make_boxed_func(run)

    def two_layers(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(function(q, k, v), k, v)

    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 300, heads, 48, generator=generator, requires_grad=True) for heads in (6, 2, 2)]
    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    torch.compiler.reset()
    compiled = torch.compile(two_layers, fullgraph=True, dynamic=False, backend=backend)
    found, expected = compiled(flex.attention, *states), two_layers(reference.attention, *states)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=generator)
    for one, other in zip(*(torch.autograd.grad(out, states, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    forward, backward = graphs
    assert forward["flex_attention"] == backward["flex_attention_backward"] == 2
    assert forward["aten.ge.Tensor"] == backward["aten.ge.Tensor"] == 0  # query >= key, where a mask is built
    # Another graph takes the same mask; of another length another, and then the first again.
    shorter = [x[:, :200] for x in states]
    one_layer = torch.compile(flex.attention, fullgraph=True, dynamic=False, backend=backend)
    for arguments in (states, shorter, states):
        torch.testing.assert_close(one_layer(*arguments), reference.attention(*arguments))
    first, _, again, other, the_same = inputs
    assert first
    assert first == again == the_same
    assert not first & other


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["flex", "flash_attention_2", "flash_attention_3"])
def test_right_or_rejected_at_every_case(name: str, dtype: torch.dtype) -> None:
    """Each case as if it were a run's own call: what is compiled anew for each shape is tried at few others."""
    implementation = get_implementation("attention", name)
    if dtype not in implementation.dtypes:
        pytest.skip(f"{name} does not support {dtype}")
    try:
        function = load_function("attention", implementation)
    except Unavailable as reason:
        pytest.skip(str(reason))
    op = get_op("attention")
    found = {
        case: verify(op, implementation, function, [call], torch.device("cuda"), cases=[], to_the_end=True)
        for case, call in op.cases(dtype).items()
    }
    assert {verdict.status for verdict in found.values()} <= {"verified", "wrong", "failed_to_compile"}, found
    verified = [verdict for verdict in found.values() if verdict.status == "verified"]
    assert verified, found
    assert all(verdict.checks >= 8 for verdict in verified), found
