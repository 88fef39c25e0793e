"""On an H100: what each kernel is to reach, all candidates of a shape in one run, from CUDA graphs, bf16.

`python -m pytest -m gpu tests/kernels/test_figures.py -s` prints what was measured. Shares are those of the copy
ceiling that the least possible traffic reaches, forward + backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmmed.autotune.measure import _SECONDS, Measurement, measure_ceilings, measure_op
from llmmed.autotune.plan import Ceilings
from llmmed.autotune.step_plan import release
from llmmed.kernels.base import Call, TensorSpec, Unavailable, tensor_spec
from llmmed.kernels.catalog import COMPILED, DEFAULT, get_implementation, get_op, load_function

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or "H100" not in torch.cuda.get_device_name(), reason="the figures are an H100's"
    ),
]

GPU = torch.device("cuda")
NOISE = 1.01  # a tie may fall to either side


def states(*shape: int) -> TensorSpec:
    return tensor_spec(*shape, dtype=torch.bfloat16, requires_grad=True)


def weights(*shape: int) -> TensorSpec:
    return tensor_spec(*shape, dtype=torch.float32, requires_grad=True)


@functools.cache
def ceilings() -> Ceilings:
    found = measure_ceilings(GPU, [torch.bfloat16])
    assert found is not None
    print(f"\ncopy {found.copy_gb_per_second:,.0f} GB/s")
    return found


def measure(call: Call, *names: str, **others: Callable[..., Any]) -> dict[str, Measurement]:
    """Implementations of an op by name, `compiled` among them, and other functions with its arguments."""
    torch.compiler.reset()
    release(GPU)  # what graphs of the shape before held
    functions: dict[str, Callable[..., Any]] = {}
    for name in names:
        try:
            function = load_function(call.op, get_implementation(call.op, DEFAULT if name == COMPILED else name))
        except Unavailable:
            continue  # Liger is not installed
        compiles = name in (COMPILED, "flex")
        functions[name] = torch.compile(function, fullgraph=True, dynamic=False) if compiles else function

    def failed(name: str, error: Exception) -> None:
        raise error

    found = measure_op(
        get_op(call.op),
        functions | others,
        {call: 1},
        device=GPU,
        mode="graphs",
        ceilings=ceilings(),
        turn=lambda name: None,
        failed=failed,
    )
    print(f"\n{call.op}: {call.describe()}")
    for name, each in found.items():
        print(
            f"  {name:16} {each.total_ms:8.4f} ms ({each.total_ms_low:.4f} to {each.total_ms_high:.4f}), forward "
            f"{each.forward_ms:.4f}, share {each.share_of_ceiling:.3f}, {each.peak_memory_mib:,.0f} MiB"
        )
    return found


def share(found: dict[str, Measurement]) -> float:
    value = found["triton"].share_of_ceiling
    assert value is not None
    return value


def is_no_slower(found: dict[str, Measurement], *rivals: str) -> bool:
    return found["triton"].total_ms <= NOISE * min(found[name].total_ms for name in rivals if name in found)


@pytest.mark.parametrize(
    ("rows", "width"), [(24576, 384), (32768, 768), (16384, 2048), (16384, 4096), (8192, 8192)]
)  # fmt: skip
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_norms(op: str, rows: int, width: int) -> None:
    residual = {"residual": states(rows, width)} if op == "add_rms_norm" else {}
    call = Call.of(op, x=states(rows, width), **residual, weight=weights(width), eps=1e-6)
    found = measure(call, DEFAULT, COMPILED, "liger", "triton")
    assert is_no_slower(found, DEFAULT, COMPILED, "liger")
    assert width < 768 or share(found) >= 0.85


@pytest.mark.parametrize("shape", [(48, 512, 8, 48), (32, 1024, 12, 64), (8, 2048, 16, 128)])
def test_rotary(shape: tuple[int, int, int, int]) -> None:
    """Queries and keys are parts of one projection, as in the model."""
    _, length, heads, head = shape
    stride = (length * 3 * heads * head, 3 * heads * head, head, 1)
    part = TensorSpec(shape, torch.bfloat16, stride, requires_grad=True)
    table = tensor_spec(length, head // 2, dtype=torch.float32)
    found = measure(Call.of("rotary", q=part, k=part, cos=table, sin=table), COMPILED, "liger", "triton")
    assert is_no_slower(found, COMPILED)
    assert share(found) >= 0.90


@pytest.mark.parametrize(("rows", "width"), [(24576, 1536), (32768, 2048), (16384, 5632)])
def test_swiglu(rows: int, width: int) -> None:
    found = measure(
        Call.of("swiglu", gate=states(rows, width), up=states(rows, width)), DEFAULT, COMPILED, "liger", "triton"
    )
    assert share(found) >= 0.97


@pytest.mark.parametrize(
    ("rows", "width", "d_ff", "most"), [(24576, 384, 1536, 0.88), (32768, 768, 2048, 0.9), (16384, 2048, 5632, 0.96)]
)
def test_swiglu_mlp(rows: int, width: int, d_ff: int, most: float) -> None:
    """Against the same products with a compiled activation between them."""
    weights_in_16_bits = {"gate_up_weight": states(2 * d_ff, width), "down_weight": states(width, d_ff)}
    call = Call.of("swiglu_mlp", x=states(rows, width), **weights_in_16_bits)
    found = measure(call, DEFAULT, COMPILED, "triton")
    assert found["triton"].total_ms <= NOISE * most * found[COMPILED].total_ms


@pytest.mark.parametrize(("rows", "vocab"), [(8192, 49152), (24576, 16384), (8192, 131072)])
def test_cross_entropy(rows: int, vocab: int) -> None:
    call = Call.of(
        "cross_entropy", logits=states(rows, vocab), targets=tensor_spec(rows, dtype=torch.int64), ignore_index=-100,
        scale=None,
    )  # fmt: skip
    assert share(measure(call, COMPILED, "triton")) >= 0.80


class _Products(torch.autograd.Function):
    """The three products of a linear layer, with the weight's gradient in float32 as `linear_cross_entropy` has it."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, rounded: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_states, rounded)
        return hidden_states @ rounded.T

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, rounded = ctx.saved_tensors
        return upstream @ rounded, torch.mm(upstream.T, hidden_states, out_dtype=torch.float32), None


@pytest.mark.parametrize(
    ("rows", "width", "most"), [(24576, 384, 1.25), (16384, 768, 1.2), (32768, 768, 1.15), (16384, 2048, 1.15)]
)  # fmt: skip
def test_linear_cross_entropy(rows: int, width: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many times its three products, in an eighth of the memory that eager PyTorch takes besides."""
    # Here the GPU is at its power limit: until its clock has settled, what follows a pause looks faster.
    monkeypatch.setitem(_SECONDS, "cuda", 1.0)
    vocab = 49152
    rounded = torch.randn(vocab, width, device=GPU, dtype=torch.bfloat16)

    def products(hidden_states: Tensor, weight: Tensor, **rest: object) -> Tensor:
        result: Tensor = _Products.apply(hidden_states, weight, rounded)
        return result

    call = Call.of(
        "linear_cross_entropy", hidden_states=states(rows, width), weight=weights(vocab, width),
        targets=tensor_spec(rows, dtype=torch.int64), ignore_index=-100, scale=None,
    )  # fmt: skip
    found = measure(call, COMPILED, "triton", "triton_recompute", products=products)
    ratio = found["triton"].total_ms / found["products"].total_ms
    print(f"  {ratio:.3f} times its products")
    gradients = (rows * width * 2 + vocab * width * 4) / 2**20
    eager = measure(call, DEFAULT)[DEFAULT].peak_memory_mib
    ours = found["triton"].peak_memory_mib
    assert eager is not None
    assert ours is not None
    assert 8 * (ours - gradients) <= eager - gradients
    assert ratio <= most


@pytest.mark.parametrize("shape", [(48, 512, 8, 48), (16, 1024, 12, 64), (8, 2048, 16, 128), (2, 8192, 16, 128)])
def test_attention(shape: tuple[int, int, int, int]) -> None:
    """In both directions at least the speed of PyTorch's flash backend."""
    found = measure(
        Call.of("attention", q=states(*shape), k=states(*shape), v=states(*shape)), DEFAULT, "flash", "triton"
    )
    assert found["triton"].forward_ms <= NOISE * found["flash"].forward_ms
    assert found["triton"].backward_ms <= NOISE * found["flash"].backward_ms


@pytest.mark.parametrize(
    ("batch", "seq", "heads", "head_dim", "most"), [(32, 1024, 12, 64, 0.82), (8, 2048, 16, 128, 0.92)]
)
def test_rotary_attention(batch: int, seq: int, heads: int, head_dim: int, most: float) -> None:
    """Against a compiled rotation and cuDNN's attention."""
    table = tensor_spec(seq, head_dim // 2, dtype=torch.float32)
    qkv = states(batch, seq, 3 * heads, head_dim)
    found = measure(Call.of("rotary_attention", qkv=qkv, cos=table, sin=table, n_heads=heads), COMPILED, "triton")
    assert found["triton"].total_ms <= NOISE * most * found[COMPILED].total_ms


@pytest.mark.parametrize(
    ("stacks", "most_ms"),
    [
        (((24, 384, 384), (18, 384, 1536)), 0.45),
        (((48, 768, 768), (36, 768, 2048)), 2.8),
        (((64, 2048, 2048), (48, 2048, 5632)), 46.0),
    ],
    ids=["small", "base", "large"],
)
def test_newton_schulz(stacks: tuple[tuple[int, int, int], ...], most_ms: float) -> None:
    """All matrices of a model."""
    calls = [Call.of("newton_schulz", G=tensor_spec(*stack, dtype=torch.bfloat16)) for stack in stacks]
    total = sum(measure(call, COMPILED, "triton")["triton"].total_ms for call in calls)
    assert total <= most_ms
