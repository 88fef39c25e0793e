"""The clock: it tells fast from slow, gives all candidates the same inputs, and drops those that raise."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmmed.autotune import measure as clock_module
from llmmed.autotune.measure import Measurement, measure_ceilings, measure_op
from llmmed.autotune.plan import Ceilings, Mode
from llmmed.autotune.workload import Workload
from llmmed.kernels.base import Call, tensor_spec
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


class Gpu:
    """A host and a device that works through what it was given, in seconds that pass only here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.idle_from = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(gpu.now, gpu.idle_from)

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(cycles / 1.98e9))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait())
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(L2_cache_size=16, multi_processor_count=1),
        )
        monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def work(self, seconds: float) -> None:
        self.idle_from = max(self.now, self.idle_from) + seconds

    def wait(self) -> None:
        self.now = max(self.now, self.idle_from)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("first_ms", [0.4, 10.0, 3000.0])
def test_what_hides_the_launches_does_not_grow_of_itself(
    first_ms: float, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from a first pass that compiles, nor where a candidate waits for the device in the middle."""
    gpu = Gpu(monkeypatch)
    passes = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal passes
        gpu.now += (first_ms if passes == 0 else 0.4) / 1e3
        passes += 1
        gpu.work(0.1e-3)
        if waits:
            gpu.wait()
        return x

    clock = clock_module._CudaClock(CPU)
    subject = clock_module._Subject(forward, [{"x": torch.ones(2)}])
    subject.prepare = lambda: None  # type: ignore[method-assign]
    clock_module._warm_up(subject, clock)
    begun = gpu.now
    sample = clock.run(subject)
    assert sample.forward == pytest.approx(0.1 if not waits else sample.forward)  # no launch is waited for
    assert (gpu.now - begun) * 1e3 < 2.0
    pass_seconds = subject.work_seconds + clock.hiding_seconds(subject)
    assert pass_seconds == pytest.approx(gpu.now - begun, rel=0.2)
    assert clock_module._rounds([pass_seconds], 0.25) == 100


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


def test_launches_are_hidden_for_as_long_as_they_take_but_not_for_ever() -> None:
    """A candidate that waits for the device in the middle of its pass has a host's time of any length."""
    assert clock_module._hiding_seconds(0.004) > 0.004
    assert clock_module._hiding_seconds(5.0) == clock_module._hiding_seconds(0.02) < 0.05


@pytest.mark.gpu
def test_graphs_are_timed_beside_each_other_without_their_launches(norms: Workload) -> None:
    """All that a candidate does is in its graphs, also where they share memory."""

    def twice(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(rms_norm(x, weight, eps), weight, eps)

    def found(mode: Mode) -> dict[str, Measurement]:
        return measure_op(
            get_op("rms_norm"),
            {"once": rms_norm, "twice": twice, "again": rms_norm},
            norms.by_op()["rms_norm"],
            device=torch.device("cuda"),
            mode=mode,
            ceilings=None,
            turn=lambda name: None,
            failed=failures.__setitem__,
        )

    failures: dict[str, Exception] = {}
    graphs = found("graphs")
    assert set(graphs) == {"once", "twice", "again"}
    assert not failures
    assert graphs["again"].total_ms == pytest.approx(graphs["once"].total_ms, rel=0.1)
    for direction in ("forward_ms", "backward_ms"):
        assert getattr(graphs["twice"], direction) == pytest.approx(2 * getattr(graphs["once"], direction), rel=0.3)
    assert graphs["once"].host_ms is None
    assert graphs["once"].peak_memory_mib is not None
    assert graphs["once"].total_ms < found("compiled")["once"].total_ms


@pytest.mark.gpu
def test_a_replay_computes_what_a_launched_pass_does(norms: Workload) -> None:
    """Of every set, into memory of its own."""
    device, op = torch.device("cuda"), get_op("rms_norm")
    call = next(iter(norms.by_op()["rms_norm"]))
    clock = clock_module._GraphClock(device)
    subject = clock_module._Subject(rms_norm, [clock_module._inputs(op, call, device, seed) for seed in range(3)])
    clock_module._warm_up(subject, clock)
    outputs, gradients = subject.capture(clock._pool, 3, device)
    clock.run(subject)
    for index in range(3):
        expected = subject.forward(index)
        torch.testing.assert_close(outputs[index], expected)
        torch.testing.assert_close(gradients[index], subject.backward(expected, index))


@pytest.mark.gpu
def test_one_that_fails_in_its_capture_leaves_the_others(norms: Workload) -> None:
    def fails(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("not in a graph")
        return rms_norm(x, weight, eps)

    failures: dict[str, Exception] = {}
    found = measure_op(
        get_op("rms_norm"),
        {"fails": fails, "once": rms_norm},
        norms.by_op()["rms_norm"],
        device=torch.device("cuda"),
        mode="graphs",
        ceilings=None,
        turn=lambda name: None,
        failed=failures.__setitem__,
    )
    assert set(found) == {"once"}
    assert str(failures["fails"]) == "not in a graph"


class Graph:
    """A CUDA graph that notes what is done while it is captured, and takes a millisecond for each."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.actions = 0

    def capture_begin(self, pool: object) -> None:
        Graph.capturing = self

    def capture_end(self) -> None:
        Graph.capturing = None

    def replay(self) -> None:
        assert Graph.capturing is None
        self.gpu.work(1e-3 * self.actions)

    gpu: Gpu


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU that captures graphs, with 100 MiB of free memory of which a pass takes 10."""
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(Graph, "gpu", gpu, raising=False)
    for name, value in {
        "CUDAGraph": Graph,
        "Stream": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (100 * 2**20, 200 * 2**20),
        "memory_allocated": lambda device: 0,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 10 * 2**20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    clock_module._capture_stream.cache_clear()
    return gpu


@pytest.mark.parametrize(("sets", "captured"), [(3, 3), (16, 5)])
def test_graphs_go_through_as_many_sets_as_there_is_memory_for(sets: int, captured: int, graphs: Gpu) -> None:
    def forward(x: Tensor) -> Tensor:
        if Graph.capturing is not None:
            Graph.capturing.actions += 2
        return x * 2

    clock = clock_module._GraphClock(CPU)
    subject = clock_module._Subject(forward, [{"x": torch.ones(2, requires_grad=True)} for _ in range(sets)])
    subject.prepare()
    assert clock.run(subject).host_forward is not None  # a launched pass: it warms up
    clock.prepare(subject)
    assert subject.captured_sets == captured
    sample = clock.run(subject)
    assert sample.forward == pytest.approx(2.0)  # of one set
    assert sample.backward == 0.0
    assert sample.host_forward is None
    assert subject.work_seconds < 1.0


def test_what_a_capture_raises_is_told_and_ends_it(graphs: Gpu) -> None:
    def fails(x: Tensor) -> Tensor:
        if Graph.capturing is not None:
            raise ValueError("not in a graph")
        return x * 2

    clock = clock_module._GraphClock(CPU)
    subject = clock_module._Subject(fails, [{"x": torch.ones(2, requires_grad=True)}])
    subject.prepare()
    with pytest.raises(ValueError, match="not in a graph"):
        clock.prepare(subject)
    assert Graph.capturing is None


def test_sets_of_inputs_are_together_eight_times_the_cache(norms: Workload, graphs: Gpu) -> None:
    clock = clock_module._GraphClock(CPU)
    clock._flush = torch.empty(2 * 2**20, dtype=torch.int8)  # an L2 cache of 1 MiB
    for rows, expected in ((2**10, 16), (2**13, 4), (2**20, 1)):
        x = tensor_spec(rows, 128, dtype=torch.bfloat16, requires_grad=True)
        weight = tensor_spec(1, dtype=torch.float32)
        assert clock.sets(Call.of("rms_norm", x=x, weight=weight, eps=1e-6)) == expected
