"""What the kernels do not compute they refuse, in a sentence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from llmmed.kernels import catalog
from llmmed.kernels.base import Implementation, Kernels, Unavailable
from llmmed.kernels.catalog import COMPILED, DEFAULT, default_choice, load_kernels
from llmmed.kernels.swiglu.triton_impl import swiglu


@pytest.mark.parametrize("shape", [(1, 16), (5, 1), (16,)])
def test_swiglu_expands_nothing(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gate is \(5, 16\) and up .*; expand one of them"):
        swiglu(torch.ones(5, 16), torch.ones(shape))


def test_swiglu_of_an_odd_fused_width() -> None:
    with pytest.raises(ValueError, match="even width, not 7"):
        swiglu(torch.ones(2, 7))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))])
def test_a_table_of_kernels_can_be_copied_and_says_what_it_has_not(copied: Callable[[Kernels], Kernels]) -> None:
    table = load_kernels(default_choice())
    copy_of_it = copied(table)
    assert copy_of_it.chosen == table.chosen
    assert copy_of_it.rms_norm is table.rms_norm
    with pytest.raises(AttributeError, match="no kernel for op 'dropout' in this table; it has add_rms_norm, "):
        _ = copy_of_it.dropout


def test_compiled_over_a_part_that_cannot_be_compiled_is_refused_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    found = catalog.get_implementation

    def planted(op: str, name: str) -> Implementation:
        implementation = found(op, DEFAULT if name == "untraceable" else name)
        return replace(implementation, name=name, compiles=False) if name == "untraceable" else implementation

    monkeypatch.setattr(catalog, "get_implementation", planted)
    choice = default_choice() | {"cross_entropy": "untraceable"}
    load_kernels(choice)
    with pytest.raises(Unavailable, match="'compiled' of op 'linear_cross_entropy' compiles op 'cross_entropy' too"):
        load_kernels(choice | {"linear_cross_entropy": COMPILED})
    load_kernels(default_choice() | {"linear_cross_entropy": COMPILED, "cross_entropy": COMPILED})
