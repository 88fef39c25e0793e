"""What the kernels do not compute they refuse, in a sentence."""

from __future__ import annotations

import pytest
import torch

from llmmed.kernels.swiglu.triton_impl import swiglu


@pytest.mark.parametrize("shape", [(1, 16), (5, 1), (16,)])
def test_swiglu_expands_nothing(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gate is \(5, 16\) and up .*; expand one of them"):
        swiglu(torch.ones(5, 16), torch.ones(shape))


def test_swiglu_of_an_odd_fused_width() -> None:
    with pytest.raises(ValueError, match="even width, not 7"):
        swiglu(torch.ones(2, 7))
