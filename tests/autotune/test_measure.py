"""The clock: it tells fast from slow, gives all candidates the same inputs, and drops those that raise."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from llmmed.autotune.measure import Measurement, measure_ceilings, measure_op, median_interval
from llmmed.autotune.plan import Ceilings
from llmmed.autotune.workload import Workload
from llmmed.kernels.catalog import get_op
from llmmed.kernels.rms_norm.pytorch import rms_norm

CPU = torch.device("cpu")


def measure(norms: Workload, functions: dict[str, Any], failures: dict[str, Exception]) -> dict[str, Measurement]:
    return measure_op(
        get_op("rms_norm"),
        functions,
        norms.by_op()["rms_norm"],
        device=CPU,
        mode="eager",
        ceilings=None,
        turn=lambda name: None,
        failed=failures.__setitem__,
    )


def slow(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    time.sleep(0.005)
    return rms_norm(x, weight, eps)


def test_tells_fast_from_slow_and_counts_calls(norms: Workload) -> None:
    failures: dict[str, Exception] = {}
    found = measure(norms, {"fast": rms_norm, "slow": slow}, failures)
    assert not failures
    assert found["slow"].total_ms_low > found["fast"].total_ms_high
    assert found["slow"].forward_ms >= 5 * 5  # five calls
    assert found["slow"].total_ms_low <= found["slow"].total_ms <= found["slow"].total_ms_high
    assert found["slow"].backward_ms < found["slow"].forward_ms
    assert found["fast"].peak_memory_mib is None
    assert found["fast"].share_of_ceiling is None


def test_what_raises_is_told_and_the_others_go_on(norms: Workload) -> None:
    calls = 0

    def breaks_later(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise ValueError("enough")
        return rms_norm(x, weight, eps)

    failures: dict[str, Exception] = {}
    found = measure(norms, {"pytorch": rms_norm, "breaks": breaks_later}, failures)
    assert set(found) == {"pytorch"}
    assert str(failures["breaks"]) == "enough"


def test_with_nothing_left_there_is_nothing(norms: Workload) -> None:
    def breaks(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise MemoryError

    failures: dict[str, Exception] = {}
    assert measure(norms, {"breaks": breaks}, failures) == {}
    assert isinstance(failures["breaks"], MemoryError)


def test_all_get_the_same_inputs_and_gradients(norms: Workload) -> None:
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}

    def spy(name: str) -> Any:
        def function(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            out = rms_norm(x, weight, eps)
            out.register_hook(lambda gradient: seen[name].append(gradient.clone()))
            seen[name].append(x.detach().clone())
            return out

        return function

    measure(norms, {"a": spy("a"), "b": spy("b")}, {})
    assert len(seen["a"]) > 4
    for a, b in zip(seen["a"], seen["b"], strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("n", "interval"), [(1, (0, 0)), (7, (0, 6)), (15, (3, 11)), (100, (39, 60))])
def test_the_interval_of_the_median(n: int, interval: tuple[int, int]) -> None:
    _, low, high = median_interval(range(n))
    assert (low, high) == interval


def test_the_interval_holds_the_median_of_all_with_95_percent() -> None:
    """The k-th of n samples is above it as rarely as a coin shows fewer than k heads. One sample less on each side
    would be too few."""
    for n in range(6, 101):
        _, low, high = median_interval(range(n))
        assert low == n - 1 - high
        wide, narrow = (1 - 2 * sum(math.comb(n, i) for i in range(int(low) + k)) / 2**n for k in (1, 2))
        assert wide >= 0.95 > narrow - 0.002, n


def test_a_cpu_has_no_ceiling() -> None:
    assert measure_ceilings(CPU) is None


@pytest.mark.gpu
def test_a_gpu_has_ceilings_and_memory(norms: Workload) -> None:
    device = torch.device("cuda")
    ceilings = measure_ceilings(device, [torch.bfloat16])
    assert isinstance(ceilings, Ceilings)
    assert ceilings.copy_gb_per_second > 100
    assert ceilings.product_tflops["bfloat16"] > 10
    found = measure_op(
        get_op("rms_norm"),
        {"pytorch": rms_norm},
        norms.by_op()["rms_norm"],
        device=device,
        mode="eager",
        ceilings=ceilings,
        turn=lambda name: None,
        failed=lambda name, error: pytest.fail(f"{name}: {error}"),
    )["pytorch"]
    assert found.peak_memory_mib is not None
    assert found.peak_memory_mib > 0
    assert found.host_ms is not None
    assert found.share_of_ceiling is not None
    assert 0 < found.share_of_ceiling < 1
