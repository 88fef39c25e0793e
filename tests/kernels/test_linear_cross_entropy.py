"""How the Triton `linear_cross_entropy` divides its rows: the whole logits never exist at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmmed.kernels.ahead_of_time import record_launches
from llmmed.kernels.base import Call, tensor_spec
from llmmed.kernels.catalog import get_implementation, get_op, load_function
from llmmed.kernels.linear_cross_entropy import triton_impl
from llmmed.kernels.linear_cross_entropy.triton_impl import _CHUNK_MIB, Chunk, _chunk_rows
from llmmed.kernels.operator import INTERPRETED
from llmmed.kernels.tunable import Site
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
    budget = _CHUNK_MIB * 2**20 * (4 / 3 if chunk >= rows / 2 else 1)
    assert chunk <= 16 or chunk * vocab * itemsize <= budget + 128 * vocab * itemsize


@pytest.mark.parametrize(("rows", "chunks"), [(6144, 2), (12288, 2), (16384, 2), (16512, 3), (24576, 4), (32768, 6)])
def test_two_chunks_may_take_a_third_more_than_one_of_many(rows: int, chunks: int) -> None:
    """A row of 49,152 classes in 16 bits is 96 KiB: 16384 rows are two chunks of 768 MiB, not three of 512."""
    assert -(-rows // _chunk_rows(rows, 2 * 49152, Chunk(576))) == chunks


@pytest.mark.parametrize("mib", [_CHUNK_MIB // 4, _CHUNK_MIB // 2, _CHUNK_MIB, 2 * _CHUNK_MIB])
@pytest.mark.parametrize(("rows", "vocab"), [(32768, 49152), (24576, 49152), (16384, 131072), (8192, 50304)])
def test_chunks_are_alike(rows: int, vocab: int, mib: int) -> None:
    chunk = _chunk_rows(rows, vocab * 2, Chunk(mib))
    chunks = -(-rows // chunk)
    assert rows - (chunks - 1) * chunk > chunk - 128 * chunks  # the last one


@pytest.mark.parametrize("name", ["triton", "triton_recompute"])
@pytest.mark.parametrize("vocab", [16384, 49152, 131072])
def test_no_launch_of_a_search_takes_more_memory_than_the_default(name: str, vocab: int) -> None:
    """A search goes by time alone, and larger chunks save little of it."""
    (tunable,) = (t for t in get_implementation("linear_cross_entropy", name).tunable if t.kernel == "chunks")
    site = Site("chunks", (("itemsize", 2), ("vocab", vocab), ("width", 768)))
    device = torch.device("cpu")
    default, *others = (
        _chunk_rows(32768, 2 * vocab, Chunk(**values))
        for values in (tunable.default(device, site), *tunable.alternatives(device, site))
    )
    assert others
    assert max(others) < default


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")
def test_a_row_of_any_vocabulary_is_read_by_16_bytes_and_its_target_before_it_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    call = Call.of(
        "linear_cross_entropy",
        hidden_states=tensor_spec(64, 16, dtype=torch.float16, requires_grad=True),
        weight=tensor_spec(1003, 16, dtype=torch.float32, requires_grad=True),
        targets=tensor_spec(64, dtype=torch.int64),
        ignore_index=-100,
        scale=None,
    )
    launches = record_launches("linear_cross_entropy", "triton", [call], targets=[90])
    (launch,) = (each for each in launches if each.kernel == triton_impl.IMPL.kernel_names[0])
    kernel = triton_impl.linear_cross_entropy_triton_fwd_kernel
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options).asm
    loads = re.findall(r"ld\.global\S*", compiled["ptx"])
    kept = "ld.global.L1::evict_last.L2::cache_hint.v4.b32"  # by the first walk, for the second
    assert sorted(loads) == [
        kept,
        "ld.global.b16",
        *["ld.global.b64"] * 2,
        "ld.global.v4.b32",
    ]  # its logit, two targets
    # Sums across threads hold barriers. A load after the last of them may come after another thread's store.
    logit = re.search(r"tt\.load .* : !tt\.ptr<f16>", compiled["ttgir"])
    assert logit
    assert logit.start() < compiled["ttgir"].index("tt.reduce")


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
