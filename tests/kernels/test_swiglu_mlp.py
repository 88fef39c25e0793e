"""What the Triton `swiglu_mlp` does beside its two kernels: pieces of a sum, two kernels for one, refusals."""

from __future__ import annotations

import pytest
import torch

from llmmed.autotune.verify import verify
from llmmed.kernels.ahead_of_time import TARGETS
from llmmed.kernels.catalog import get_implementation, get_op
from llmmed.kernels.operator import Gpu, absent_gpu
from llmmed.kernels.swiglu_mlp import triton_impl
from llmmed.kernels.swiglu_mlp.triton_impl import _FORWARD, _summed_over_rows, swiglu_mlp


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 24, 25])
def test_a_sum_over_rows_in_pieces_is_the_whole_sum(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, width, generator=generator) for width in (5, 3))
    monkeypatch.setattr(triton_impl, "_MOST_ELEMENTS", 8 * 5 + 2)  # eight rows
    torch.testing.assert_close(_summed_over_rows(left, right), left.mT @ right)


@pytest.mark.interpreter
def test_without_the_forward_kernel_it_is_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    op, implementation = get_op("swiglu_mlp"), get_implementation("swiglu_mlp", "triton")
    separate = triton_impl._forward_launch(torch.device("cpu"), 64, 64, 4, 1)._replace(fused=0)
    monkeypatch.setattr(_FORWARD, "_default", lambda *_, **__: separate)
    verdict = verify(op, implementation, implementation.load(), [], torch.device("cpu"), dtype=torch.float32)
    assert verdict.status == "verified", verdict


@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("gpu", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("width", "fused"), [(384, 1), (1024, 1), (1032, 0), (2048, 0)])
def test_a_long_sum_is_left_to_cublas_unless_a_search_says_otherwise(
    width: int, fused: int, gpu: Gpu, descriptors: int
) -> None:
    shape = {"width": width, "d_ff": 4096, "itemsize": 2, "descriptors": descriptors}
    meta = torch.device("meta")
    with absent_gpu(gpu):
        launch = triton_impl._forward_launch(meta, **shape)
        (other,) = triton_impl._forward_alternatives(meta, **shape)
    assert (launch.fused, other.fused) == (fused, 1 - fused)
    assert launch[:-1] == other[:-1]


@pytest.mark.parametrize(("x", "gate_up", "down"), [((4, 8), (32, 9), (8, 16)), ((4, 8), (30, 8), (8, 16)),
                                                   ((4, 7), (32, 8), (8, 16))])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(
    x: tuple[int, ...], gate_up: tuple[int, ...], down: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"swiglu_mlp \(triton\): x is .* \[2 d_ff, d_model\]"):
        swiglu_mlp(torch.ones(x), torch.ones(gate_up), torch.ones(down))
