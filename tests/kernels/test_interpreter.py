"""What Triton's interpreter is spared changes nothing: for a launch the language is adapted, and then given back.

But for `tl.core`, which Triton leaves adapted after the first call of a function of its own, say `tl.sum`.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from llmmed.kernels.interpreter import spare_interpreter

pytestmark = pytest.mark.interpreter


@triton.jit
def doubled(x):
    return tl.where(x > 0, x + x, 2 * x)


@triton.jit
def sums_kernel(x_ptr, sum_ptr, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * WIDTH + tl.arange(0, WIDTH))
    tl.store(sum_ptr + row, tl.sum(doubled(x), axis=0) + tl.max(doubled(x), axis=0))


@triton.jit
def refused_kernel(x_ptr):
    tl.static_assert(doubled(tl.load(x_ptr)) > 0, "not this one")


def assert_adapted_for_a_launch(x: torch.Tensor) -> None:
    found = torch.empty(len(x))
    with mock.patch.object(interpreter, "_patch_lang_core", wraps=interpreter._patch_lang_core) as adapted:
        sums_kernel[(len(x),)](x, found, WIDTH=x.shape[1])
    torch.testing.assert_close(found, 2 * (x.sum(1) + x.amax(1)))
    # The kernel's module has `tl`; that of `tl.sum` has `tl` and the module that it is made of.
    assert 1 <= adapted.call_count <= 3


def test_the_language_is_adapted_for_each_launch_and_given_back() -> None:
    spare_interpreter()
    assert_adapted_for_a_launch(torch.randn(2, 8))
    before = dict(vars(tl)), dict(vars(tl.tensor))
    for rows in (2, 16):
        assert_adapted_for_a_launch(torch.randn(rows, 8))
        assert (dict(vars(tl)), dict(vars(tl.tensor))) == before
    with pytest.raises(interpreter.InterpreterError, match="not this one"):
        refused_kernel[(1,)](torch.zeros(1))
    assert (dict(vars(tl)), dict(vars(tl.tensor))) == before
    assert_adapted_for_a_launch(torch.randn(2, 8))


def test_overflows_are_computed_where_they_are_reported() -> None:
    spare_interpreter()
    options = interpreter.interpreter_builder.options
    assert options.sanitize_overflow == options.debug
