"""The way of `linear_cross_entropy` on Hopper, whose first product writes exponentials.

What lies around the product runs anywhere, here with a product by PyTorch; the product itself on Hopper alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmmed.autotune.verify import poisoned_memory, verify
from llmmed.kernels.ahead_of_time import TARGETS
from llmmed.kernels.base import Call, Inputs, tensor_spec
from llmmed.kernels.catalog import get_implementation, get_op, load_function
from llmmed.kernels.linear_cross_entropy import exponentials, hopper, triton_impl
from llmmed.kernels.linear_cross_entropy.cases import REGIMES, cases
from llmmed.kernels.operator import INTERPRETED, absent_gpu
from tests.kernels.planted import bugs, mutant

OP = get_op("linear_cross_entropy")
NAMES = ("triton", "triton_recompute")


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hopper_takes_exponentials_in_bfloat16(capability: int, dtype: torch.dtype) -> None:
    def takes(width: int, row_stride: int, weight_strides: tuple[int, int]) -> bool:
        hidden_states = torch.empty_strided((6, width), (row_stride, 1), dtype=dtype, device="meta")
        weight = torch.empty_strided((16, width), weight_strides, dtype=dtype, device="meta")
        with absent_gpu(TARGETS[capability]):
            return exponentials.takes(hidden_states, weight)

    expected = capability == 90 and dtype == torch.bfloat16 and not INTERPRETED
    assert takes(24, 24, (24, 1)) == takes(24, 40, (24, 1)) == expected
    # Rows of no whole 16 bytes, whichever way; one row for all; a weight that is transposed, and a part of another.
    for others in ((20, 24, (20, 1)), (24, 44, (24, 1)), (24, 0, (24, 1)), (24, 24, (1, 16)), (24, 24, (48, 1))):
        assert not takes(*others)


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
            assert bool(again[0]) == bool(again[1:].any())
        self.rows.append(int(wanted.sum()))
        found = torch.exp(logits - shifts[:, None]).clamp(max=2.0**100)
        past = (0, len(sums) * hopper.CLASSES - logits.shape[1])
        tiled = torch.nn.functional.pad(logits, past, value=-torch.inf).view(len(x), len(sums), -1)
        maxima[:, wanted] = tiled.amax(2).T[:, wanted]
        sums[:, wanted] = torch.nn.functional.pad(found, past).view(tiled.shape).sum(2).T[:, wanted]
        if out is not None:
            out[wanted] = found[wanted]


def patch(module: Any, product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets float32 on a CPU go the way of Hopper's bfloat16, but for the product in Gluon."""
    monkeypatch.setattr(module.hopper, "exponentiate", product)
    monkeypatch.setattr(module, "takes", lambda hidden_states, weight: hidden_states.numel() > 0)


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Iterator[Product]:
    product = Product()
    patch(exponentials, product, monkeypatch)
    yield product
    assert product.rows


def stated(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Inputs:
    rest = {"targets": targets, "ignore_index": -100, "scale": None}
    return {"hidden_states": hidden_states, "weight": weight, **rest}


def differentiated(inputs: Inputs, function: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [inputs[name].detach().requires_grad_() for name in ("hidden_states", "weight")]
    loss = function(leaves[0], leaves[1], inputs["targets"], inputs["ignore_index"], inputs["scale"])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def error(inputs: Inputs, found: list[Tensor]) -> float:
    """Against float64: the largest relative error of the loss, the gradients and the parts of these."""
    exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    largest = 0.0
    names = ("loss", "grad_hidden_states", "grad_weight")
    for name, value, truth in zip(names, found, differentiated(exact, OP.reference), strict=True):
        parts = (OP.parts or (lambda *_: {}))(inputs, name, truth)
        for mask in (torch.ones_like(truth, dtype=torch.bool), *parts.values()):
            off, size = ((t.double() * mask).norm() for t in (value - truth, truth))
            largest = max(largest, (off / size).item() if off else 0.0)
            if not off.isfinite():
                return float("inf")
    return largest


def small_inputs() -> Iterator[Inputs]:
    """Values of all kinds, in two chunks of no more than a block of rows."""
    for name in ("one row", "odd vocabulary", "many rows", "rows of a wider tensor"):
        for regime in REGIMES:
            call = cases(torch.float32)[name]
            yield OP.make_inputs(call, regime, torch.Generator().manual_seed(0), torch.device("cpu"))


def far_inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    """Losses of hundreds of nats in the second block of the first chunk and in the last; the likeliest class of each is
    in the last tile of classes."""
    generator = torch.Generator().manual_seed(0)
    hidden_states, weight = torch.randn(300, 8, generator=generator), torch.randn(704, 8, generator=generator)
    weight[-1] = 10 * hidden_states[130]
    weight[-2] = 10 * hidden_states[299]
    targets = (hidden_states @ weight.T).argmax(1)
    targets[130] = targets[299] = 3
    inputs = stated(hidden_states, weight, targets)
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()} | {
        "hidden_states": hidden_states.to(device, dtype)
    }


@pytest.mark.interpreter
@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("name", NAMES)
def test_it_is_right(name: str) -> None:
    """To float32's precision but for the target's logit, which is summed twice, in two orders."""
    function = load_function(OP.name, get_implementation(OP.name, name))
    for inputs in small_inputs() if name == "triton" else [far_inputs()]:
        assert error(inputs, differentiated(inputs, function)) < 1e-4


@pytest.mark.interpreter
def test_blocks_with_a_loss_past_44_nats_are_computed_again(product: Product) -> None:
    inputs = far_inputs()
    assert error(inputs, differentiated(inputs, triton_impl.linear_cross_entropy)) < 1e-5
    assert product.rows == [256, 128, 44, 44]


@pytest.mark.interpreter
@pytest.mark.parametrize("bug", bugs(OP.name, "EXPONENTIALS_BUGS"))
def test_a_bug_around_the_product_shows(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, function = mutant(OP.name, bug, tmp_path, "EXPONENTIALS_BUGS")
    patch(function.__globals__["exponentials"], Product(), monkeypatch)
    foreign = stated(torch.ones(3, 8), torch.ones(4, 8), torch.tensor([0, 4, 1]))

    def shows() -> Iterable[bool]:
        yield not differentiated(foreign, function)[0].isnan()
        for inputs in (far_inputs(), *small_inputs()):
            yield error(inputs, differentiated(inputs, function)) > 1e-3

    assert any(shows())


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
@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("only", ["hidden_states", "weight"])
def test_one_gradient_is_what_it_is_beside_the_other(only: str) -> None:
    inputs = far_inputs()
    both = dict(
        zip(("hidden_states", "weight"), differentiated(inputs, triton_impl.linear_cross_entropy)[1:], strict=True)
    )
    leaf = inputs[only].detach().requires_grad_()
    (alone,) = torch.autograd.grad(triton_impl.linear_cross_entropy(**{**inputs, only: leaf}), [leaf])
    assert torch.equal(alone, both[only])


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
        added = (hidden_states * residuals[:, None])[counts].double()
        expected = before.double().index_add(0, targets[counts].long(), added)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def large_call(rows: int, width: int, vocab: int) -> Call:
    return Call.of(
        OP.name,
        hidden_states=tensor_spec(rows, width, dtype=torch.bfloat16, requires_grad=True),
        weight=tensor_spec(vocab, width, dtype=torch.float32, requires_grad=True),
        targets=tensor_spec(rows, dtype=torch.int64),
        ignore_index=-100,
        scale=None,
    )


def large_inputs(rows: int, width: int, vocab: int, regime: str) -> Inputs:
    """The weight is one that bfloat16 can hold."""
    call, device = large_call(rows, width, vocab), torch.device("cuda")
    inputs = OP.make_inputs(call, regime, torch.Generator(device).manual_seed(rows), device)
    return {**inputs, "weight": inputs["weight"].detach().bfloat16().float()}


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
class TestOnHopper:
    """Warps that wait for each other: each ring must go around more than twice, and end anywhere."""

    @pytest.mark.parametrize("regime", ["bland", "peaked", "some_ignored"])
    @pytest.mark.parametrize("programs", [1, 2, 3, 7])
    @pytest.mark.parametrize(
        ("rows", "width", "vocab"),
        # Widths of one step, two, three, as many as wait for the next tile, and more.
        [(1, 8, 8), (129, 64, 300), (300, 128, 700), (300, 136, 700), (600, 192, 1000), (1100, 328, 2056),
         (2048, 512, 513), (200, 40, 1)],
    )  # fmt: skip
    def test_it_is_right_however_many_tiles_a_program_takes(
        self, rows: int, width: int, vocab: int, programs: int, regime: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hopper, "programs", lambda x, vocab: programs)
        inputs = large_inputs(rows, width, vocab, regime)
        assert exponentials.takes(inputs["hidden_states"].detach(), inputs["weight"].bfloat16())
        for name in NAMES if regime == "peaked" else NAMES[:1]:
            function = load_function(OP.name, get_implementation(OP.name, name))
            with poisoned_memory():
                loss, *gradients = found = differentiated(inputs, function)
                with torch.no_grad():
                    assert torch.equal(loss, function(**inputs))
            if vocab == 1:  # but for the two orders of the target's logit, all is zero
                assert all(value.abs().max() < 1e-4 for value in found)
            else:
                assert error(inputs, [loss, *gradients]) < 6e-3

    def test_losses_of_hundreds_of_nats_are_right(self) -> None:
        inputs = far_inputs(torch.bfloat16, "cuda")
        inputs = {**inputs, "weight": inputs["weight"].bfloat16().float()}
        assert error(inputs, differentiated(inputs, triton_impl.linear_cross_entropy)) < 6e-3

    @pytest.mark.parametrize(("rows", "width", "vocab"), [(8192, 768, 49152), (6000, 384, 50257), (4096, 2048, 32000)])
    def test_a_whole_gpu_is_right_and_gives_the_same_bits_every_time(self, rows: int, width: int, vocab: int) -> None:
        inputs = large_inputs(rows, width, vocab, "peaked")
        with poisoned_memory():
            first = differentiated(inputs, triton_impl.linear_cross_entropy)
            assert error(inputs, first) < 6e-3
            for _ in range(20):
                again = differentiated(inputs, triton_impl.linear_cross_entropy)
                assert all(map(torch.equal, first, again))

    @pytest.mark.parametrize("bug", bugs(OP.name, "HOPPER_BUGS"))
    def test_a_planted_bug_is_rejected(self, bug: str, tmp_path: Path) -> None:
        _, function = mutant(OP.name, bug, tmp_path, "HOPPER_BUGS")
        call = large_call(1024, 200, 24000)  # five tiles a program
        implementation = get_implementation(OP.name, "triton")
        verdict = verify(OP, implementation, function, [call], torch.device("cuda"), dtype=torch.bfloat16)
        assert verdict.status == "wrong", verdict
