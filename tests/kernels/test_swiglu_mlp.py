"""The Triton `swiglu_mlp`: pieces of a sum, how it is launched where, its kernels for Hopper, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmmed.autotune.verify import poisoned_memory, verify
from llmmed.kernels.ahead_of_time import TARGETS
from llmmed.kernels.catalog import get_implementation, get_op
from llmmed.kernels.operator import Gpu, absent_gpu
from llmmed.kernels.swiglu_mlp import hopper, triton_impl
from llmmed.kernels.swiglu_mlp.reference import swiglu_mlp as reference
from llmmed.kernels.swiglu_mlp.triton_impl import (
    _FORWARD,
    APART,
    SPECIALISED,
    TILES,
    _summed_over_rows,
    swiglu_mlp,
)
from llmmed.kernels.tunable import seen_launches
from tests.kernels.planted import bugs, mutant


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 24, 25])
def test_a_sum_over_rows_in_pieces_is_the_whole_sum(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, width, generator=generator) for width in (5, 3))
    monkeypatch.setattr(triton_impl, "_MOST_ELEMENTS", 8 * 5 + 2)  # eight rows
    torch.testing.assert_close(_summed_over_rows(left, right), left.mT @ right)


@pytest.mark.interpreter
def test_without_the_forward_kernel_it_is_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    op, implementation = get_op("swiglu_mlp"), get_implementation("swiglu_mlp", "triton")
    separate = triton_impl._forward_launch(torch.device("cpu"), 64, 64, 4, 1)._replace(how=APART)
    monkeypatch.setattr(_FORWARD, "_default", lambda *_, **__: separate)
    verdict = verify(op, implementation, implementation.load(), [], torch.device("cpu"), dtype=torch.float32)
    assert verdict.status == "verified", verdict


@pytest.mark.interpreter
def test_above_a_width_the_activations_result_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width, d_ff = 5, 16, 40
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((rows, width), (2 * d_ff, width), (width, d_ff))]
    gradients = []
    for limit, tensors_of_hidden_units in ((width, 3), (width - 1, 2)):
        monkeypatch.setattr(triton_impl, "_KEPT_UP_TO", limit)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(noting(kept), lambda tensor: tensor):
            y = swiglu_mlp(*leaves)
        of_hidden_units = sum(t.numel() for t in kept) - sum(leaf.numel() for leaf in leaves)
        assert of_hidden_units == rows * d_ff * tensors_of_hidden_units
        gradients.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("gpu", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("d_ff", "width"), [(4096, 384), (4096, 1024), (4096, 1032), (4096, 2048), (4104, 384)])
def test_hopper_has_kernels_of_its_own_and_elsewhere_cublas_a_long_sum(
    d_ff: int, width: int, gpu: Gpu, descriptors: int
) -> None:
    shape = {"width": width, "d_ff": d_ff, "itemsize": 2, "descriptors": descriptors}
    meta = torch.device("meta")
    with absent_gpu(gpu):
        forward, backward = triton_impl._forward_launch(meta, **shape), triton_impl._backward_launch(meta, **shape)
        others = {launch.how for launch in triton_impl._forward_alternatives(meta, **shape)}
    if descriptors and gpu.capability == 90 and d_ff == 4096:
        assert (forward.how, backward.how) == (SPECIALISED, SPECIALISED)
    else:
        assert (forward.how, backward.how) == (TILES if width <= 1024 else APART, TILES)
    assert others == {TILES, APART}


@pytest.mark.parametrize(("x", "gate_up", "down"), [((4, 8), (32, 9), (8, 16)), ((4, 8), (30, 8), (8, 16)),
                                                   ((4, 7), (32, 8), (8, 16))])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(
    x: tuple[int, ...], gate_up: tuple[int, ...], down: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"swiglu_mlp \(triton\): x is .* \[2 d_ff, d_model\]"):
        swiglu_mlp(torch.ones(x), torch.ones(gate_up), torch.ones(down))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
class TestOnHopper:
    """Warps that wait for each other: each ring must go around more than twice, and end anywhere."""

    @pytest.mark.parametrize("kept", [True, False])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("programs", [1, 2, 3, 7])
    @pytest.mark.parametrize(("rows", "width", "d_ff"), [(1, 8, 128), (129, 64, 128), (300, 136, 384), (1100, 328, 640),
                                                         (2048, 512, 256)])  # fmt: skip
    def test_it_is_right_however_many_tiles_a_program_takes(
        self, rows: int, width: int, d_ff: int, programs: int, dtype: torch.dtype, kept: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(triton_impl, "_KEPT_UP_TO", width if kept else 0)
        monkeypatch.setattr(hopper, "programs", lambda x, d_ff: programs)
        given, dy = drawn(rows, width, d_ff, dtype)
        with seen_launches() as launches, poisoned_memory():
            found = differentiated(swiglu_mlp, given, dy)
        assert [values["how"] for values in launches.values()] == [SPECIALISED, SPECIALISED]
        assert_right(found, given, dy)

    @pytest.mark.parametrize(("rows", "width", "d_ff"), [(32768, 768, 2048), (24500, 384, 1536), (5000, 2048, 5632)])
    def test_a_whole_gpu_is_right_and_gives_the_same_bits_every_time(self, rows: int, width: int, d_ff: int) -> None:
        given, dy = drawn(rows, width, d_ff, torch.bfloat16)
        with poisoned_memory():
            first = differentiated(swiglu_mlp, given, dy)
            assert_right(first, given, dy)
            for _ in range(20):
                again = differentiated(swiglu_mlp, given, dy)
                assert all(map(torch.equal, first, again))

    @pytest.mark.parametrize("bug", bugs("swiglu_mlp", "HOPPER_BUGS"))
    def test_a_planted_bug_is_rejected(self, bug: str, tmp_path: Path) -> None:
        _, function = mutant("swiglu_mlp", bug, tmp_path, "HOPPER_BUGS")
        op, implementation = get_op("swiglu_mlp"), get_implementation("swiglu_mlp", "triton")
        verdict = verify(op, implementation, function, [], torch.device("cuda"), dtype=torch.bfloat16)
        assert verdict.status == "wrong", verdict


def noting(kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    return note


def drawn(rows: int, width: int, d_ff: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The three arguments, and a gradient that arrives."""
    generator = torch.Generator("cuda").manual_seed(rows)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype) * scale

    weights = [normal(2 * d_ff, width, scale=width**-0.5), normal(width, d_ff, scale=(d_ff / 3) ** -0.5)]
    return [normal(rows, width), *weights], normal(rows, width)


def assert_right(found: list[Tensor], given: list[Tensor], dy: Tensor) -> None:
    """Not further from float64 than PyTorch is by more than half."""
    exact = differentiated(reference, [tensor.double() for tensor in given], dy.double())
    for ours, theirs, right in zip(found, differentiated(plain, given, dy), exact, strict=True):
        assert error(ours, right) <= 1.5 * error(theirs, right) + 1e-4


def plain(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up_weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down_weight)


def differentiated(function: Callable[..., Tensor], given: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())
