"""The clock: times verified candidates of one op side by side, at the calls of the workload, forward and backward.

All candidates get the same inputs and take turns, so that a drift of the clock rate or a busy neighbour meets all of
them. On a GPU every pass starts with a cold L2, its launches are issued behind a sleeping kernel so that the device
never waits for the host, and the host's own time to issue them is taken in the same pass. What counts depends on the
mode:

* `eager`: the longer of device and host time, since the step pays whichever is longer;
* `compiled`: what is made of PyTorch's operations is compiled by itself (`fullgraph=True`, static shapes) and device
  time alone counts, since the step issues all its launches in one go. What a compiler could fuse across ops, only the
  step shows;
* `graphs`: the same, replayed from CUDA graphs as in the step, over several sets of inputs one after the other, so that
  what a single launch costs is not counted as the kernel's.

On a CPU it is plain elapsed time with warm caches, without memory and without a ceiling.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llmmed.autotune.intervals import median_interval
from llmmed.autotune.plan import Ceilings, Mode
from llmmed.kernels.base import Call, Cost, Implementation, Inputs, Op
from llmmed.kernels.catalog import DEFAULT

_SECONDS = {"cuda": 0.25, "cpu": 0.5}  # of timed passes, for each candidate and call
_ROUNDS = (7, 100)
_WARM_UP_PASSES = (3, 30)
_STABLE = 0.05  # warm-up ends when two passes in a row differ by less than this share
_REPLAY_HIDING = 4e-4  # seconds in which a host issues two replays and what is around them
_MOST_SETS = 16  # of inputs that a graph goes through
_ROOM = 0.5  # of the free memory, which they may take


@dataclass(frozen=True)
class Measurement:
    """One candidate over a micro-batch's calls of its op; fields as in `plan.Candidate`."""

    forward_ms: float
    backward_ms: float
    total_ms: float
    total_ms_low: float
    total_ms_high: float
    host_ms: float | None
    peak_memory_mib: float | None
    share_of_ceiling: float | None


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass, in ms.

    Host times are None on a CPU, where they are the times, and for graphs, of which the host issues next to nothing.
    """

    forward: float
    backward: float
    host_forward: float | None = None
    host_backward: float | None = None

    def cost(self, mode: Mode) -> float:
        """What the step pays for it."""
        if mode != "eager" or self.host_forward is None or self.host_backward is None:
            return self.forward + self.backward
        return max(self.forward, self.host_forward) + max(self.backward, self.host_backward)


def measure_op(
    op: Op,
    functions: Mapping[str, Callable[..., Any]],
    calls: Mapping[Call, int],
    *,
    device: torch.device,
    mode: Mode,
    ceilings: Ceilings | None,
    turn: Callable[[str], None],
    failed: Callable[[str, Exception], None],
) -> dict[str, Measurement]:
    """Times every candidate.

    Args:
        op: The op.
        functions: The verified candidates by name, in other modes than `eager` already compiled.
        calls: The workload's calls of this op and how often a micro-batch makes each.
        device: Where.
        mode: What counts; see above.
        ceilings: The device's, for `share_of_ceiling`; None leaves that out.
        turn: Told whose turn it is, before it runs and outside of what is timed.
        failed: Told of a candidate that raised; it takes no further part. It may raise to end the measurement.

    Returns:
        A measurement for each candidate that did not fail.
    """
    passes: dict[Call, dict[str, list[Pass]]] = {}
    alive = dict(functions)
    memory: dict[str, float | None] = dict.fromkeys(alive)

    def take_memory(name: str, peak: float | None) -> None:
        memory[name] = peak if peak is None else max(peak, memory[name] or 0.0)

    for call in calls:
        passes[call] = take_turns(
            op, call, alive, device=device, mode=mode, seconds=_SECONDS[device.type], turn=turn, failed=failed,
            memory=take_memory,
        )  # fmt: skip
        alive = {name: alive[name] for name in passes[call]}
    costs = {call: op.cost(call) for call in calls}
    return {
        name: _summarise({c: passes[c][name] for c in calls}, calls, costs, mode, ceilings, memory[name])
        for name in alive
    }


def take_turns(
    op: Op,
    call: Call,
    functions: Mapping[str, Callable[..., Any]],
    *,
    device: torch.device,
    mode: Mode,
    seconds: float,
    turn: Callable[[str], None],
    failed: Callable[[str, Exception], None],
    memory: Callable[[str, float | None], None] | None = None,
) -> dict[str, list[Pass]]:
    """Times functions at one call, after a warm-up of each.

    Args:
        op, call, functions, device, mode, turn, failed: As of `measure_op`.
        seconds: Of timed passes for each, within a least and a most number of them.
        memory: Told of each one's peak, in MiB, if that is wanted.

    Returns:
        The passes of each that did not fail.
    """
    clock = _clock(device, mode)
    inputs = [_inputs(op, call, device, seed) for seed in range(clock.sets(call))]
    subjects = {name: _Subject(function, inputs) for name, function in functions.items()}
    passes: dict[str, list[Pass]] = {name: [] for name in functions}

    def attempt(action: Callable[[str, _Subject], None], names: Sequence[str]) -> None:
        for name in names:
            turn(name)
            try:
                action(name, subjects[name])
            except Exception as error:  # noqa: BLE001 - whatever a candidate raises rejects that candidate alone
                failed(name, error)
                del subjects[name], passes[name]

    attempt(lambda name, subject: _warm_up(subject, clock), list(subjects))
    if memory is not None:
        attempt(lambda name, subject: memory(name, clock.peak_memory_mib(subject)), list(subjects))
    attempt(lambda name, subject: clock.prepare(subject), list(subjects))
    for index in range(_rounds([s.work_seconds + clock.hiding_seconds(s) for s in subjects.values()], seconds)):
        names = list(subjects)
        first = index % max(1, len(names))
        attempt(lambda name, subject: passes[name].append(clock.run(subject)), names[first:] + names[:first])
    return passes


def compiled_alone(implementation: Implementation, mode: Mode) -> bool:
    """Whether a candidate is compiled by itself to be timed: what has kernels of its own runs in a compiled step as it
    is, and what is made of PyTorch's is up to the compiler."""
    return mode != "eager" and (implementation.name == DEFAULT or not implementation.kernel_names)


def measure_ceilings(device: torch.device, product_dtypes: Sequence[torch.dtype] = ()) -> Ceilings | None:
    """What the GPU reaches now: an elementwise kernel (GB/s read + write), and 8192^3 products (TFLOP/s).

    None on a CPU, where caches make a copy's speed no ceiling.
    """
    if device.type != "cuda":
        return None
    clock = _CudaClock(device)
    x = torch.randn(2**27, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy_ms = median(clock.device_ms(functools.partial(torch.mul, x, 2.0, out=y)) for _ in range(20))
    del x, y
    tflops = {}
    for dtype in product_dtypes:
        a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
        product_ms = median(clock.device_ms(lambda a=a, b=b: a @ b) for _ in range(10))  # type: ignore[misc]
        tflops[str(dtype).removeprefix("torch.")] = 2 * 8192**3 / product_ms / 1e9
        del a, b
    return Ceilings(copy_gb_per_second=2 * 2**28 / copy_ms / 1e6, product_tflops=tflops)


def _summarise(
    passes: Mapping[Call, Sequence[Pass]],
    counts: Mapping[Call, int],
    costs: Mapping[Call, Cost],
    mode: Mode,
    ceilings: Ceilings | None,
    memory: float | None,
) -> Measurement:
    """Medians of every call, times its count, added up; so are the ends of their intervals, which errs to the wide."""
    total = low = high = forward = backward = host = least = 0.0
    has_host = True
    for call, count in counts.items():
        samples = passes[call]
        middle, lower, upper = median_interval([p.cost(mode) for p in samples])
        total, low, high = total + count * middle, low + count * lower, high + count * upper
        forward += count * median(p.forward for p in samples)
        backward += count * median(p.backward for p in samples)
        issued = [p.host_forward + p.host_backward for p in samples if p.host_forward is not None and p.host_backward]
        has_host = has_host and bool(issued)
        host += count * median(issued) if issued else 0.0
        least += count * _least_ms(call, costs[call], ceilings) if ceilings else 0.0
    return Measurement(
        forward_ms=forward,
        backward_ms=backward,
        total_ms=total,
        total_ms_low=low,
        total_ms_high=high,
        host_ms=host if has_host else None,
        peak_memory_mib=memory,
        share_of_ceiling=least / (forward + backward) if ceilings else None,
    )


def _least_ms(call: Call, cost: Cost, ceilings: Ceilings) -> float:
    """The time of the least traffic or arithmetic, whichever takes longer, each direction by itself."""
    tflops = ceilings.product_tflops.get(str(call.compute_dtype).removeprefix("torch."), math.inf)
    directions = ((cost.forward_bytes, cost.forward_flops), (cost.backward_bytes, cost.backward_flops))
    return sum(max(n / ceilings.copy_gb_per_second / 1e6, flops / tflops / 1e9) for n, flops in directions)


def _inputs(op: Op, call: Call, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(seed)
    inputs = op.make_inputs(call, op.regimes[0], generator, device)
    for name, spec in call.tensors.items():
        inputs[name].requires_grad_(spec.requires_grad and name in op.differentiable)
    return inputs


class _Subject:
    """A candidate with its inputs, ready to run.

    All of `sets` are alike; graphs go through all of them, single passes take the first.
    """

    def __init__(self, function: Callable[..., Any], sets: Sequence[Inputs]) -> None:
        self.function = function
        self.sets = sets
        self.leaves = [[v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad] for inputs in sets]
        self.upstream: list[list[Tensor]] = []  # a set's, as many as it has outputs
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph | None] | None = None  # forward, backward
        self.captured_sets = 0  # that these go through
        self.host_seconds = 0.0  # that the host takes to issue one warm pass
        self.work_seconds = math.inf  # of one warm pass, everything around it included but what hides its launches

    def forward(self, index: int = 0) -> list[Tensor]:
        outputs = self.function(**self.sets[index])
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return [output for output in outputs if output.requires_grad] if self.leaves[index] else outputs

    def backward(self, outputs: list[Tensor], index: int = 0) -> tuple[Tensor | None, ...]:
        if not self.leaves[index]:
            return ()
        return torch.autograd.grad(outputs, self.leaves[index], self.upstream[index], allow_unused=True)

    def prepare(self) -> None:
        """Draws the gradients that arrive, the same for all candidates. That of a loss is one."""
        outputs = self.forward()
        generator = torch.Generator(device=outputs[0].device).manual_seed(1)
        self.upstream = [
            [
                torch.ones_like(o)
                if not o.ndim
                else torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype)
                for o in outputs
            ]
            for _ in self.sets
        ]

    def capture(
        self, pool: Any, count: int, device: torch.device
    ) -> tuple[list[list[Tensor]], list[tuple[Tensor | None, ...]]]:
        """Captures the forward passes of the first `count` sets in one graph, and their backward passes in another.

        Returns each set's outputs and gradients. Once the caller drops them, graphs captured later in the pool may
        write over them: between two replays of this pair, not within one.
        """
        outputs: list[list[Tensor]] = []
        gradients: list[tuple[Tensor | None, ...]] = []  # kept: each set writes its own, as in a step
        numbers = range(count)
        forward = _captured(lambda: outputs.extend(self.forward(i) for i in numbers), pool, device)
        backward = None
        if self.leaves[0]:
            backward = _captured(lambda: gradients.extend(self.backward(outputs[i], i) for i in numbers), pool, device)
        self.graphs, self.captured_sets = (forward, backward), count
        return outputs, gradients


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace, on an H100 of 32 MiB, for each stream that it has met."""
    return torch.cuda.Stream(device)


def _captured(action: Callable[[], object], pool: Any, device: torch.device) -> torch.cuda.CUDAGraph:
    """As `torch.cuda.graph`, without its collection of garbage, which takes longer than a capture."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.stream(_capture_stream(device)):
        graph.capture_begin(pool=pool)
        try:
            action()
        except BaseException:
            with contextlib.suppress(Exception):
                graph.capture_end()  # what the action raised says more than that its capture is void
            raise
        graph.capture_end()
    return graph


class _CpuClock:
    def sets(self, call: Call) -> int:
        return 1

    def prepare(self, subject: _Subject) -> None:
        pass

    def hiding_seconds(self, subject: _Subject) -> float:
        return 0.0

    def run(self, subject: _Subject) -> Pass:
        start = time.perf_counter()
        outputs = subject.forward()
        middle = time.perf_counter()
        subject.backward(outputs)
        return Pass((middle - start) * 1e3, (time.perf_counter() - middle) * 1e3)

    def peak_memory_mib(self, subject: _Subject) -> float | None:
        return None


class _CudaClock:
    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device=device)
        self._device = device
        self._cycles_per_ms = 2_000_000  # not less than any GPU's clock rate: a sleep too long is harmless

    def sets(self, call: Call) -> int:
        """How many sets of inputs it wants."""
        return 1

    def prepare(self, subject: _Subject) -> None:
        """Told of each that is warm, before it is timed."""

    def run(self, subject: _Subject) -> Pass:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        self._sleep(self.hiding_seconds(subject))
        self._flush.zero_()
        events[0].record()
        start = time.perf_counter()
        outputs = subject.forward()
        host_forward = time.perf_counter() - start
        events[1].record()
        self._flush.zero_()
        events[2].record()
        start = time.perf_counter()
        subject.backward(outputs)
        host_backward = time.perf_counter() - start
        events[3].record()
        torch.cuda.synchronize(self._device)
        forward, backward = events[0].elapsed_time(events[1]), events[2].elapsed_time(events[3])
        return Pass(forward, backward, host_forward * 1e3, host_backward * 1e3)

    def device_ms(self, action: Callable[[], object]) -> float:
        """Device time of a few launches, with a cold L2."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._sleep(_hiding_seconds(1e-3))
        self._flush.zero_()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize(self._device)
        elapsed: float = start.elapsed_time(end)
        return elapsed

    def peak_memory_mib(self, subject: _Subject) -> float | None:
        """Allocated at the worst moment of a forward and backward pass, beyond inputs and arriving gradients."""
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        subject.backward(subject.forward())
        torch.cuda.synchronize(self._device)
        return (torch.cuda.max_memory_allocated(self._device) - before) / 2**20

    def hiding_seconds(self, subject: _Subject) -> float:
        """For how long the device sleeps before a pass."""
        return _hiding_seconds(subject.host_seconds)

    def _sleep(self, seconds: float) -> None:
        torch.cuda._sleep(int(self._cycles_per_ms * 1e3 * seconds))


class _GraphClock(_CudaClock):
    """Times replays of CUDA graphs; warms up without, since a capture must find everything compiled."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._pool = torch.cuda.graph_pool_handle()
        # A pool ends with the last of its graphs, and its handle with it: a first candidate may fail in its capture.
        flag = torch.zeros(1, device=device)
        self._holds_the_pool = _captured(flag.zero_, self._pool, device)

    def sets(self, call: Call) -> int:
        """Together eight times the cache, so that each finds it without what it needs. Fewer may be captured."""
        size = sum(spec.nbytes for spec in call.tensors.values())
        return max(1, min(_MOST_SETS, math.ceil(4 * self._flush.numel() / max(1, size))))

    def prepare(self, subject: _Subject) -> None:
        peak = (self.peak_memory_mib(subject) or 0.0) * 2**20  # of one set, all of which are there at once
        torch.cuda.empty_cache()  # while a graph is captured, it stays as it is
        room = _ROOM * torch.cuda.mem_get_info(self._device)[0]
        count = max(1, min(len(subject.sets), int(room / max(peak, 1.0))))
        subject.capture(self._pool, count, self._device)
        self.run(subject)  # the first replay also takes the graph to the device
        begun = time.perf_counter()
        self.run(subject)
        subject.work_seconds = time.perf_counter() - begun - self.hiding_seconds(subject)

    def hiding_seconds(self, subject: _Subject) -> float:
        return _REPLAY_HIDING if subject.graphs else super().hiding_seconds(subject)

    def run(self, subject: _Subject) -> Pass:
        if subject.graphs is None:
            return super().run(subject)
        forward, backward = subject.graphs
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        self._sleep(_REPLAY_HIDING)
        self._flush.zero_()
        events[0].record()
        forward.replay()
        events[1].record()
        if backward is not None:
            self._flush.zero_()
            events[2].record()
            backward.replay()
            events[3].record()
        torch.cuda.synchronize(self._device)
        count = subject.captured_sets
        backward_ms = events[2].elapsed_time(events[3]) / count if backward is not None else 0.0
        return Pass(events[0].elapsed_time(events[1]) / count, backward_ms)


_Clock = _CpuClock | _CudaClock


def _clock(device: torch.device, mode: Mode) -> _Clock:
    if device.type != "cuda":
        return _CpuClock()
    return _GraphClock(device) if mode == "graphs" else _CudaClock(device)


def _hiding_seconds(host_seconds: float) -> float:
    """For how long to keep the device busy, so that all launches are queued before the first starts."""
    return 1e-4 + 1.5 * min(host_seconds, 0.02)


def _warm_up(subject: _Subject, clock: _Clock) -> None:
    """Compiles, fills caches and raises clocks: passes until two in a row agree, or a time limit is reached."""
    subject.prepare()
    least, most = _WARM_UP_PASSES
    previous = math.inf
    started = time.perf_counter()
    for index in range(most):
        hiding, begun = clock.hiding_seconds(subject), time.perf_counter()
        sample = clock.run(subject)
        if index:  # the first one compiles
            subject.work_seconds = min(subject.work_seconds, time.perf_counter() - begun - hiding)
            issuing = ((sample.host_forward or 0.0) + (sample.host_backward or 0.0)) / 1e3
            # The least of all: one that waits for the device has waited for the sleep, too, which must not grow of it.
            subject.host_seconds = min(subject.host_seconds or math.inf, issuing)
        current = sample.forward + sample.backward
        enough = index + 1 >= least and time.perf_counter() - started > _SECONDS["cpu"]
        if enough or (index + 1 >= least and abs(current - previous) <= _STABLE * previous):
            return
        previous = current


def _rounds(pass_seconds: Sequence[float], seconds: float) -> int:
    """As many rounds as the time allows to all candidates together, within bounds."""
    least, most = _ROUNDS
    number = len(pass_seconds)
    return max(least, min(most, int(seconds * number / max(sum(pass_seconds), 1e-9)))) if number else 0
