"""A part of a row of logits held in registers: where it is, that it is right, and that the gate sees where it is not.

By default columns are held only in rows that the interpreter would take minutes for. Here the launch says it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmmed.autotune.verify import Verdict, verify
from llmmed.kernels.ahead_of_time import Launch, compile_launches, record_launches
from llmmed.kernels.base import Call, Implementation, tensor_spec
from llmmed.kernels.catalog import get_implementation, get_op, load_function
from llmmed.kernels.cross_entropy.triton_impl import IMPL, cross_entropy
from llmmed.kernels.linear_cross_entropy import exponentials
from llmmed.kernels.linear_cross_entropy.triton_impl import _padded_row
from llmmed.kernels.operator import INTERPRETED
from llmmed.kernels.tunable import Site, Values, seen_launches
from tests.kernels.planted import bugs, mutant, sources

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOSSES = ("cross_entropy", "linear_cross_entropy")
CASES = ("one row", "odd vocabulary", "past a block")
# Held: all that can be; little, which in a padded row is padding alone.
HELD: dict[str, Callable[[int], int]] = {
    "most": lambda row: 2 ** ((row - 1).bit_length() - 1),
    "least": lambda row: 16,
}
BUGS = bugs("cross_entropy", "HELD_BUGS")


@pytest.fixture(autouse=True)
def _a_kernel_walks_rows_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, too, where `linear_cross_entropy` would do without."""
    monkeypatch.setattr(exponentials, "takes", lambda *_: False)


def judged(
    op_name: str,
    implementation: Implementation,
    function: Callable[..., Any],
    cases: Iterable[str],
    held: Callable[[int], int],
    dtype: torch.dtype,
    device: torch.device,
) -> Verdict:
    """The gate at these cases, in blocks that are smaller than their rows. One warp: so small a part has no columns for
    more, and where two hold the same one may read what the other has overwritten.
    """
    launches: dict[Site, Values] = {}
    op = get_op(op_name)
    for name in cases:
        vocab = vocabulary(op.cases(dtype)[name])
        at = {"vocab": vocab, "itemsize": dtype.itemsize} | ({"gradient": 1} if op_name == "cross_entropy" else {})
        row = vocab if op_name == "cross_entropy" else _padded_row(vocab)
        launches[Site(f"{op_name}_triton_fwd_kernel", tuple(sorted(at.items())))] = {
            "block": 32 if vocab < 1000 else 512, "stages": 1, "num_warps": 1, "per_sm": 1, "held": held(row),
        }  # fmt: skip
    implementation.take_launches(launches)
    try:
        with seen_launches() as seen:
            verdict = verify(op, implementation, function, [], device, dtype=dtype, cases=tuple(cases))
    finally:
        implementation.take_launches({})
    if verdict.status == "verified":
        assert launches.items() <= seen.items()
    return verdict


def vocabulary(call: Call) -> int:
    return call.spec("logits").shape[1] if call.op == "cross_entropy" else call.spec("weight").shape[0]


def assert_right(op: str, held: str, dtype: torch.dtype, device: torch.device) -> None:
    implementation = get_implementation(op, "triton")
    verdict = judged(op, implementation, load_function(op, implementation), CASES, HELD[held], dtype, device)
    assert verdict.status == "verified", verdict


@pytest.mark.interpreter
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("op", LOSSES)
def test_held_columns_change_nothing(op: str, held: str) -> None:
    assert_right(op, held, torch.float32, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("op", LOSSES)
def test_held_columns_change_nothing_on_a_gpu(op: str, held: str, dtype: torch.dtype) -> None:
    assert_right(op, held, dtype, CUDA)


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_can_be_planted(bug: str) -> None:
    before, after = BUGS[bug]
    assert sum(source.count(before) for source in sources("cross_entropy").values()) == 1
    assert before != after


def assert_rejected(bug: str, dtype: torch.dtype, device: torch.device, folder: Path) -> None:
    implementation, function = mutant("cross_entropy", bug, folder, "HELD_BUGS")
    # 64 of 97 columns held, 33 walked in two blocks; in the second, values that are not flat meet a gradient of one.
    cases = ("odd vocabulary", "a padded table")
    verdict = judged("cross_entropy", implementation, function, cases, HELD["most"], dtype, device)
    assert verdict.status == "wrong", verdict


@pytest.mark.interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_rejected(bug: str, tmp_path: Path) -> None:
    assert_rejected(bug, torch.float32, CPU, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_rejected_on_a_gpu(bug: str, tmp_path: Path) -> None:
    assert_rejected(bug, torch.bfloat16, CUDA, tmp_path)


@pytest.mark.interpreter
@pytest.mark.parametrize("masked", [slice(64, 128), slice(0, 64), slice(60, 127)], ids=str)
def test_columns_that_are_minus_infinity_stay_zero(masked: slice) -> None:
    """Those of a part alone too, whose maximum is then no number to subtract; and no class is NaN as ever."""
    logits = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    logits[:, masked] = float("-inf")
    targets = torch.tensor([127 if masked.start == 0 else 0, -100, 10**6])
    found = {}
    for held in (0, 64):
        values = {"block": 32, "stages": 1, "num_warps": 4, "per_sm": 1, "held": held}
        leaf = logits.clone().requires_grad_()
        IMPL.take_launches({Site(IMPL.kernel_names[0], (("gradient", 1), ("itemsize", 4), ("vocab", 128))): values})
        try:
            losses = [cross_entropy(leaf[i : i + 1], targets[i : i + 1], -100) for i in range(3)]
            found[held] = losses, torch.autograd.grad(losses[0], leaf)[0]
        finally:
            IMPL.take_launches({})
    (losses, gradient), (expected, expected_gradient) = found[64], found[0]
    torch.testing.assert_close(losses, expected, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient)
    assert losses[2].isnan()
    assert gradient.isfinite().all()
    assert gradient[0].any()
    assert not gradient[:, masked].any()


def forward(op: str, vocab: int, gradient: bool = True) -> list[Launch]:
    """The kernel that walks the rows, for each target, launched by default."""
    targets, spec = tensor_spec(64, dtype=torch.int64), functools.partial(tensor_spec, requires_grad=gradient)
    if op == "cross_entropy":
        arguments = {"logits": spec(64, vocab, dtype=torch.bfloat16)}
    else:
        hidden_states, weight = spec(64, 16, dtype=torch.bfloat16), spec(vocab, 16, dtype=torch.float32)
        arguments = {"hidden_states": hidden_states, "weight": weight}
    call = Call.of(op, **arguments, targets=targets, ignore_index=-100, scale=None)
    return [each for each in record_launches(op, "triton", [call]) if each.kernel == f"{op}_triton_fwd_kernel"]


def held_by(launches: Iterable[Launch]) -> dict[int, object]:
    """Columns, by target."""
    found = {}
    for launch in launches:
        kernel = getattr(importlib.import_module(launch.module), launch.kernel)
        found[launch.target] = launch.constants[(kernel.arg_names.index("HELD"),)]
    return found


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")
@pytest.mark.parametrize("op", LOSSES)
def test_columns_are_held_where_rows_fill_the_cache_and_a_gradient_is_written(op: str) -> None:
    assert held_by(forward(op, 131072)) == {80: 32768, 86: 32768, 89: 0, 90: 32768, 100: 0, 120: 0}
    assert set(held_by(forward(op, 262144)).values()) == {32768}
    assert set(held_by(forward(op, 49152)).values()) == {0}
    assert set(held_by(forward(op, 131072, gradient=False)).values()) == {0}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")
def test_large_vocabularies_do_not_spill() -> None:
    """Also Llama 3's, which blocks do not divide, and an odd one where rows are padded."""
    vocabularies = {"cross_entropy": (131072, 128256), "linear_cross_entropy": (131072, 131073)}
    kernels = compile_launches([each for op in LOSSES for vocab in vocabularies[op] for each in forward(op, vocab)])
    assert any("HELD=32768" in kernel.constants for kernel in kernels)
    assert not any(k.spills for k in kernels), "\n".join(k.describe() for k in kernels if k.spills)


def test_a_plan_from_before_columns_were_held_is_refused() -> None:
    site = Site(IMPL.kernel_names[0], (("gradient", 1), ("itemsize", 2), ("vocab", 131072)))
    with pytest.raises(ValueError, match=r"has no launch by block, stages, num_warps, per_sm but by .*, per_sm, held"):
        IMPL.take_launches({site: {"block": 16384, "stages": 4, "num_warps": 16, "per_sm": 2}})
