"""The Triton `linear_cross_entropy`: how it divides its rows, and what it does by exponentials on Hopper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmmed.autotune.verify import poisoned_memory, verify
from llmmed.kernels.ahead_of_time import TARGETS, record_launches
from llmmed.kernels.base import Call, Inputs, tensor_spec
from llmmed.kernels.catalog import get_implementation, get_op, load_function
from llmmed.kernels.linear_cross_entropy import exponentials, hopper, triton_impl
from llmmed.kernels.linear_cross_entropy.cases import REGIMES, cases
from llmmed.kernels.linear_cross_entropy.triton_impl import _CHUNK_MIB, Chunk, _chunk_rows
from llmmed.kernels.operator import INTERPRETED, absent_gpu
from llmmed.kernels.tunable import Site
from tests.kernels.planted import bugs, mutant
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


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hopper_takes_exponentials_in_bfloat16(capability: int, dtype: torch.dtype) -> None:
    def takes(width: int, stride: int) -> bool:
        hidden_states = torch.empty_strided((6, width), (stride, 1), dtype=dtype, device="meta")
        with absent_gpu(TARGETS[capability]):
            return exponentials.takes(hidden_states, torch.empty(10, width, dtype=dtype, device="meta"))

    expected = capability == 90 and dtype == torch.bfloat16 and not INTERPRETED
    assert takes(24, 24) == takes(24, 40) == expected
    # Rows of no whole 16 bytes, whichever way.
    assert not takes(20, 24)
    assert not takes(24, 44)


class Product:
    """What `hopper.exponentiate` does, by PyTorch; how many rows it computed each time."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(
        self, x: Tensor, weight: Tensor, shifts: Tensor, out: Tensor | None, sums: Tensor, maxima: Tensor,
        again: Tensor | None,
    ) -> None:  # fmt: skip
        logits = x @ weight.T
        wanted = torch.ones(len(x), dtype=torch.bool)
        if again is not None:
            wanted = again[1:].bool().repeat_interleave(hopper.ROWS)[: len(x)]
            assert bool(again[0]) == bool(wanted.any())
        self.rows.append(int(wanted.sum()))
        found = torch.exp(logits - shifts[:, None]).clamp(max=2.0**100)
        past = (0, len(sums) * hopper.CLASSES - logits.shape[1])
        tiled = torch.nn.functional.pad(logits, past, value=-torch.inf).view(len(x), len(sums), -1)
        maxima[:, wanted] = tiled.amax(2).T[:, wanted]
        sums[:, wanted] = torch.nn.functional.pad(found, past).view(tiled.shape).sum(2).T[:, wanted]
        if out is not None:
            out[wanted] = found[wanted]


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Iterator[Product]:
    """Lets float32 on a CPU go the way of Hopper's bfloat16, but for the product in Gluon."""
    product = Product()
    monkeypatch.setattr(hopper, "exponentiate", product)
    monkeypatch.setattr(exponentials, "takes", lambda hidden_states, weight: hidden_states.numel() > 0)
    yield product
    assert product.rows


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["triton", "triton_recompute"])
@pytest.mark.usefixtures("product")
def test_exponentials_are_right(name: str) -> None:
    """To float32's precision but for the target's logit, which is summed twice, in two orders."""
    op = get_op("linear_cross_entropy")
    function = load_function(op.name, get_implementation(op.name, name))
    for call in cases(torch.float32).values():
        for regime in REGIMES:
            inputs = op.make_inputs(call, regime, torch.Generator().manual_seed(0), torch.device("cpu"))
            exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
            expected = differentiated(exact, op.reference)
            for value, truth in zip(differentiated(inputs, function), expected, strict=True):
                assert (value - truth).norm() <= 2e-5 * truth.norm(), (call, regime)


def stated(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Inputs:
    return {
        "hidden_states": hidden_states, "weight": weight, "targets": targets, "ignore_index": -100, "scale": None,
    }  # fmt: skip


@pytest.mark.interpreter
def test_blocks_with_a_loss_past_44_nats_are_computed_again(product: Product) -> None:
    torch.manual_seed(0)
    hidden_states, weight = torch.randn(300, 8), torch.randn(40, 8)
    targets = (hidden_states @ weight.T).argmax(1)
    differentiated(stated(hidden_states, weight, targets), triton_impl.linear_cross_entropy)
    chunk = _chunk_rows(300, 160, Chunk(_CHUNK_MIB))
    assert product.rows == [chunk, 0, 300 - chunk, 0]
    product.rows.clear()
    targets[chunk + 1] = (hidden_states @ weight.T).argmin(1)[chunk + 1]
    hidden_states[chunk + 1] *= 40
    loss, *_ = differentiated(stated(hidden_states, weight, targets), triton_impl.linear_cross_entropy)
    assert product.rows == [chunk, 0, 300 - chunk, min(hopper.ROWS, 300 - chunk)]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden_states @ weight.T, targets))


@pytest.mark.interpreter
@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("where", ["a row that counts", "an ignored row", "a class"])
def test_what_is_not_a_number_stays_none(where: str) -> None:
    torch.manual_seed(0)
    hidden_states, weight, targets = torch.randn(40, 8), torch.randn(30, 8), torch.arange(40) % 20
    targets[3] = -100
    if where == "a class":  # that no target names
        weight[25, 0] = float("nan")
    else:
        hidden_states[3 if where == "an ignored row" else 4, 2] = float("nan")
    loss, *gradients = differentiated(stated(hidden_states, weight, targets), triton_impl.linear_cross_entropy)
    assert bool(loss.isnan()) == (where != "an ignored row")
    assert gradients[1].isnan().any()
    assert not gradients[0][3].any()


@pytest.mark.interpreter
@pytest.mark.usefixtures("product")
def test_the_loss_is_never_below_zero_and_nan_for_a_foreign_class() -> None:
    torch.manual_seed(0)
    weight = torch.randn(30, 64)
    hidden_states, targets = 4 * weight, torch.arange(30)
    loss, *_ = differentiated(stated(hidden_states, weight, targets), triton_impl.linear_cross_entropy)
    assert 0 <= loss < 1e-4
    targets[7] = 30
    loss, *gradients = differentiated(stated(hidden_states, weight, targets), triton_impl.linear_cross_entropy)
    assert loss.isnan()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.interpreter
@pytest.mark.parametrize("classes", [1, 3, 40])
@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 32, 300])
def test_targets_are_added_to_the_weight_however_often_a_class_occurs(
    n_rows: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of one row, of a program's rows, of many programs' rows; -1 is left out."""
    monkeypatch.setattr(exponentials, "_PLACES", 16)
    torch.manual_seed(n_rows)
    hidden_states, residuals, before = torch.randn(n_rows, 40), torch.randn(n_rows), torch.randn(classes, 40)
    drawn = torch.randint(-1, classes, (n_rows,), dtype=torch.int32)
    for targets in (drawn, drawn.clamp(max=0), torch.full_like(drawn, classes - 1), torch.full_like(drawn, -1)):
        found = before.clone()
        exponentials._add_targets(found, hidden_states, targets, residuals)
        counts = targets >= 0
        expected = before.double().index_add(
            0, targets[counts].long(), (hidden_states * residuals[:, None])[counts].double()
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def large_call(rows: int, width: int, vocab: int) -> Call:
    return Call.of(
        "linear_cross_entropy",
        hidden_states=tensor_spec(rows, width, dtype=torch.bfloat16, requires_grad=True),
        weight=tensor_spec(vocab, width, dtype=torch.float32, requires_grad=True),
        targets=tensor_spec(rows, dtype=torch.int64),
        ignore_index=-100,
        scale=None,
    )


def large_inputs(rows: int, width: int, vocab: int, regime: str) -> Inputs:
    call, device = large_call(rows, width, vocab), torch.device("cuda")
    return get_op(call.op).make_inputs(call, regime, torch.Generator(device).manual_seed(rows), device)


def differentiated(inputs: Inputs, function: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [inputs[name].detach().requires_grad_() for name in ("hidden_states", "weight")]
    loss = function(leaves[0], leaves[1], inputs["targets"], inputs["ignore_index"], inputs["scale"])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_close(inputs: Inputs, found: list[Tensor]) -> None:
    """Against float64, of the weight as it is multiplied."""
    reference = get_op("linear_cross_entropy").reference
    exact = {name: inputs[name].bfloat16().double() for name in ("hidden_states", "weight")}
    for value, expected in zip(found, differentiated(inputs | exact, reference), strict=True):
        error, size = (value.double() - expected).norm(), expected.norm()
        assert error <= (1e-5 if value.ndim == 0 else 3e-3) * size, (error, size)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
class TestOnHopper:
    """Warps that wait for each other: each ring must go around more than twice, and end anywhere."""

    @pytest.mark.parametrize("regime", ["bland", "peaked", "some_ignored"])
    @pytest.mark.parametrize("programs", [1, 2, 3, 7])
    @pytest.mark.parametrize(("rows", "width", "vocab"), [(1, 8, 8), (129, 64, 300), (600, 200, 1000),
                                                          (1100, 328, 2056), (2048, 512, 513)])  # fmt: skip
    def test_it_is_right_however_many_tiles_a_program_takes(
        self, rows: int, width: int, vocab: int, programs: int, regime: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hopper, "programs", lambda x, vocab: programs)
        inputs = large_inputs(rows, width, vocab, regime)
        assert exponentials.takes(inputs["hidden_states"].detach(), inputs["weight"].detach().bfloat16())
        with poisoned_memory():
            found = differentiated(inputs, triton_impl.linear_cross_entropy)
        assert_close(inputs, found)

    @pytest.mark.parametrize(("rows", "width", "vocab"), [(8192, 768, 49152), (6000, 384, 50257), (4096, 2048, 32000)])
    def test_a_whole_gpu_is_right_and_gives_the_same_bits_every_time(self, rows: int, width: int, vocab: int) -> None:
        inputs = large_inputs(rows, width, vocab, "peaked")
        with poisoned_memory():
            first = differentiated(inputs, triton_impl.linear_cross_entropy)
            assert_close(inputs, first)
            for _ in range(20):
                again = differentiated(inputs, triton_impl.linear_cross_entropy)
                assert all(map(torch.equal, first, again))

    @pytest.mark.parametrize("bug", bugs("linear_cross_entropy", "HOPPER_BUGS"))
    def test_a_planted_bug_is_rejected(self, bug: str, tmp_path: Path) -> None:
        _, function = mutant("linear_cross_entropy", bug, tmp_path, "HOPPER_BUGS")
        op, implementation = get_op("linear_cross_entropy"), get_implementation("linear_cross_entropy", "triton")
        call = large_call(1024, 200, 24000)  # five tiles a program
        verdict = verify(op, implementation, function, [call], torch.device("cuda"), dtype=torch.bfloat16)
        assert verdict.status == "wrong", verdict
