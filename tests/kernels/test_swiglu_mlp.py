"""What the Triton `swiglu_mlp` does beside its two kernels: pieces of a sum, two kernels for one, refusals."""

from __future__ import annotations

import pytest
import torch

from llmmed.autotune.verify import verify
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


@pytest.mark.parametrize(("width", "fused"), [(384, 1), (1024, 1), (1032, 0), (2048, 0)])
def test_a_long_sum_is_left_to_cublas(width: int, fused: int) -> None:
    with absent_gpu(Gpu(132, 50 * 2**20, 232448, 90)):
        launch = triton_impl._forward_launch(torch.device("meta"), width, 4096, 2, 1)
    assert launch.fused == fused


@pytest.mark.parametrize(("x", "gate_up", "down"), [((4, 8), (32, 9), (8, 16)), ((4, 8), (30, 8), (8, 16)),
                                                   ((4, 7), (32, 8), (8, 16))])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(
    x: tuple[int, ...], gate_up: tuple[int, ...], down: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"swiglu_mlp \(triton\): x is .* \[2 d_ff, d_model\]"):
        swiglu_mlp(torch.ones(x), torch.ones(gate_up), torch.ones(down))
