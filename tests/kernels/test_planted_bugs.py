"""The gate rejects every planted bug, and accepts the correct kernels whatever the seed."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmmed.autotune.verify import verify
from llmmed.autotune.workload import record_workload
from llmmed.compose import compose
from llmmed.kernels.base import Call, Unavailable
from llmmed.kernels.catalog import get_implementation, get_op, implementation_names, load_function, op_names
from tests.kernels.planted import bugs, mutant, ops_with_triton, sources

PLANTED = [(op, bug) for op in ops_with_triton() for bug in bugs(op)]
PLANTED_FOR_HOPPER = [
    (op, bug) for op in ops_with_triton() if "hopper" in sources(op) for bug in bugs(op, "HOPPER_BUGS")
]
TRITON = [(op, name) for op in op_names() for name in implementation_names(op) if name.startswith("triton")]
SEEDS = 20


@pytest.mark.parametrize("op", ops_with_triton())
def test_there_are_enough_bugs(op: str) -> None:
    assert len(bugs(op)) >= 8
    assert ("hopper" in sources(op)) == any(op == planted for planted, _ in PLANTED_FOR_HOPPER)


@pytest.mark.parametrize(
    ("table", "op", "bug"),
    [*(("BUGS", *each) for each in PLANTED), *(("HOPPER_BUGS", *each) for each in PLANTED_FOR_HOPPER)],
)
def test_a_bug_can_be_planted(table: str, op: str, bug: str) -> None:
    before, after = bugs(op, table)[bug]
    assert sum(source.count(before) for source in sources(op).values()) == 1
    assert before != after


@pytest.mark.interpreter
@pytest.mark.parametrize(("op", "bug"), PLANTED)
def test_a_planted_bug_is_rejected_in_float32(op: str, bug: str, tmp_path: Path) -> None:
    assert_rejected(op, bug, torch.float32, torch.device("cpu"), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "bug"), PLANTED)
def test_a_planted_bug_is_rejected_in_16_bits(op: str, bug: str, tmp_path: Path) -> None:
    assert_rejected(op, bug, torch.bfloat16, torch.device("cuda"), tmp_path)


@pytest.mark.interpreter
@pytest.mark.parametrize(("op", "name"), TRITON)
def test_correct_kernels_are_accepted_in_float32(op: str, name: str) -> None:
    """With one seed: the interpreter is slow, and the same kernels are tried with more on a GPU."""
    assert_accepted(op, name, torch.float32, torch.device("cpu"), seeds=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "name"), TRITON)
def test_correct_kernels_are_accepted(op: str, name: str, dtype: torch.dtype) -> None:
    assert_accepted(op, name, dtype, torch.device("cuda"), seeds=SEEDS)


def assert_rejected(op: str, bug: str, dtype: torch.dtype, device: torch.device, folder: Path) -> None:
    implementation, function = mutant(op, bug, folder)
    # On a GPU only a run's own calls have enough rows for every program to take several tiles.
    calls = _calls_of_a_run()[op] if device.type == "cuda" else [next(iter(get_op(op).cases(dtype).values()))]
    whole = get_op(op)
    # All shapes at their first values are a part of what the gate tries, and enough for most bugs.
    verdict = verify(replace(whole, regimes=whole.regimes[:1]), implementation, function, calls, device)
    if verdict.status == "verified":
        verdict = verify(whole, implementation, function, calls, device)
    assert verdict.status in ("wrong", "no_backward", "crashed"), verdict
    assert verdict.reason


def assert_accepted(op: str, name: str, dtype: torch.dtype, device: torch.device, seeds: int) -> None:
    implementation = get_implementation(op, name)
    try:
        function = load_function(op, implementation)
    except Unavailable as reason:
        pytest.skip(str(reason))
    names = list(get_op(op).cases(dtype))
    calls = [get_op(op).cases(dtype)[names[0]]]
    for seed in range(seeds):
        # All cases once; then the values change and not the shapes, each of which is compiled for seconds.
        few = None if seed == 0 or device.type == "cpu" else names[:2]
        # Each twice, where the same bits are promised: once in its own dtype and shapes is enough.
        same_bits = implementation.deterministic and seed == 0 and device.type == "cuda"
        verdict = verify(
            get_op(op), implementation, function, calls, device, seed=seed, cases=few, deterministic=same_bits
        )
        assert verdict.status == "verified", (seed, verdict)
        assert verdict.checks >= 10


@functools.cache
def _calls_of_a_run() -> dict[str, list[Call]]:
    sizes = ["model=small", "data=synthetic", "optimizer=muon", "train.micro_batch_size=8", "train.precision=bf16"]
    return {op: list(calls) for op, calls in record_workload(compose(sizes)).by_op().items()}
