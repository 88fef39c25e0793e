"""How the Triton `linear_cross_entropy` divides its rows: the whole logits never exist at once."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmmed.kernels.catalog import get_implementation, get_op, load_function
from llmmed.kernels.linear_cross_entropy.triton_impl import _CHUNK_MIB, Chunk, _chunk_rows
from tests.kernels.test_operators import small_cases

SHAPES = [(rows, vocab, itemsize) for rows in (1, 2, 17, 300, 8192, 24576, 2**20)
          for vocab in (7, 4099, 49152, 131072, 2**20) for itemsize in (2, 4)]  # fmt: skip


@pytest.mark.parametrize(("rows", "vocab", "itemsize"), SHAPES)
def test_a_chunk_keeps_to_its_budget_in_whole_tiles(rows: int, vocab: int, itemsize: int) -> None:
    chunk = _chunk_rows(rows, vocab * itemsize, Chunk(_CHUNK_MIB))
    assert 1 <= chunk <= rows
    assert chunk == rows or chunk % 16 == 0
    if rows >= 4096:
        assert chunk <= rows / 2 + 128
    # A tile may go over: the budget cannot always be met to the row, and never at 16 rows.
    assert chunk <= 16 or chunk * vocab * itemsize <= _CHUNK_MIB * 2**20 + 128 * vocab * itemsize


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["triton", "triton_recompute"])
def test_the_whole_logits_are_never_held(name: str) -> None:
    op = get_op("linear_cross_entropy")
    call = next(call for call in small_cases(op) if call.spec("hidden_states").shape[0] == 130)
    inputs = op.make_inputs(call, "bland", torch.Generator().manual_seed(0), torch.device("cpu"))
    leaves = [inputs[n].requires_grad_() for n in op.differentiable]
    rows, vocab = leaves[0].shape[0], leaves[1].shape[0]
    function = load_function(op.name, get_implementation(op.name, name))
    with Largest() as largest:
        torch.autograd.grad(function(**inputs), leaves)
    assert 0 < largest.elements < rows * vocab
    with Largest() as largest:
        default = load_function(op.name, get_implementation(op.name, "pytorch"))
        torch.autograd.grad(default(**inputs), leaves)
    assert largest.elements >= rows * vocab
