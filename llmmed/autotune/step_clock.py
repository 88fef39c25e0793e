"""The step's clock: plans side by side in the real model's forward and backward pass.

A plan is built as the training will build it: same shapes, same dtype, same mode, and on a GPU all of its layers, which
cost no compilation of their own. All plans share one set of parameters. Where the whole model is too large or too slow
to be tried, and on a CPU, what a shallow one shows is carried over: a plan's time is a line in the number of layers,
drawn through two depths, and what a flip saves is scaled by how often the whole model calls the op.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from llmmed.autotune.confirm import Choice, Duel, Failed, Match
from llmmed.autotune.failures import classify
from llmmed.autotune.intervals import Interval, difference_interval, median_interval
from llmmed.autotune.plan import Mode, StepTimes
from llmmed.autotune.step_plan import WARM_UP, Subject, at_depth, deepened, optimizer_update, release, shallow
from llmmed.autotune.workload import call_counts, called_ops
from llmmed.compose import accumulation_steps
from llmmed.config import Config
from llmmed.kernels.base import Kernels
from llmmed.kernels.catalog import DEFAULT, default_choice, load_kernels
from llmmed.kernels.tunable import Launches
from llmmed.model import Transformer, compute_dtype, parameter_count
from llmmed.optim import state_elements
from llmmed.training.copies import keep_copies

DEPTHS = (1, 2)
_FITS = 0.9  # of the GPU's memory: with more, or with a slower micro-batch, the whole model is not tried
_SLOWEST_MS = 500.0
_SECONDS = {"cuda": 5.0, "cpu": 2.0}  # of timed steps in one duel, at most
_FEW_ROUNDS, _FEW_ROUNDS_SECONDS = 40, 15.0  # but of slow steps on a GPU so many, if these do not take longer still
_SETTLING_SECONDS = {"cuda": 0.5, "cpu": 0.0}  # before: a GPU that has idled runs faster than it can go on
_SAMPLE_SECONDS = {"cuda": 0.008, "cpu": 0.02}  # of each timed stretch; a single step if that takes longer
_ROUNDS = {"cuda": (15, 60), "cpu": (6, 60)}  # fewer than six tell no difference with 95 %
_LOSS_ROUNDS = 7  # where a clear loss is all that is asked for: with fewer the interval is the whole range
_LOOK_EVERY = 3  # rounds: at what is known; each look is a chance to stop at a wrong moment
_PRECISE = 0.002  # of the step: with the difference known to this, more rounds would decide nothing
_RESOLUTION = {"cuda": _PRECISE, "cpu": 0.02}  # of the step: what takes less than this is not looked for
_CLEAR = 1.5  # times half of its interval: a difference so large has a sign that more rounds would not change
# Two right plans round differently; this much of a gradient's norm is no error, nor four times what the default's own
# two ways of running it differ by. The gate has judged the ops before: here it is stale or foreign memory that shows.
_DIFFERENCE = {torch.float32: 2e-3, torch.bfloat16: 0.06, torch.float16: 0.03}
# Times that (of float16 for TF32's products, which keep as many digits): a default that differs by more from itself is
# no measure for others.
_WORST_DEFAULT = 4

_Enough = Literal["difference", "sign", "loss"]
"""What ends a duel before its time is up: knowing the difference, or which is faster, or that the second is not."""

_Plan = tuple[tuple[str, str], ...]  # op and implementation, sorted: a choice that can be a key


class StepClock:
    """Builds plans and times them in turns.

    Args:
        config: The run's.
        mode: How the step runs.
        launches: By op and implementation how kernels are launched, by default where this says nothing.
    """

    def __init__(
        self, config: Config, mode: Mode, launches: Mapping[str, Mapping[str, Launches]] | None = None
    ) -> None:
        self._config, self._mode, self._launches = config, mode, launches
        self.device = torch.device(config.device)
        self.resolution = _RESOLUTION[self.device.type]
        self.layers = config.model.n_layers
        self._check_depth = self.trial_depth = min(DEPTHS[1], self.layers)
        self.depths = (min(DEPTHS[0], self.layers), self.trial_depth)
        self._weights = Transformer.for_training(
            shallow(config, self.trial_depth), load_kernels(default_choice()), config.device
        )
        self._pool: tuple[torch.cuda.CUDAGraph, Tensor, torch.cuda._POOL_HANDLE] | None = None
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (2, config.train.micro_batch_size, config.train.seq_len + 1)
        self._batches = torch.randint(config.model.vocab_size, shape, generator=generator, device=self.device)
        self._scale = torch.ones((), device=self.device)
        self._kept: dict[tuple[_Plan, int, Mode], Subject] = {}
        self._truth: dict[str, Tensor] = {}
        self._allowed: dict[str, float] = {}
        self._calls = {depth: call_counts(shallow(config, depth), {}) for depth in (self._check_depth, self.layers)}
        self._in_model = self._calls[self.layers]
        self._counted: dict[_Plan, dict[str, int]] = {}  # of the plan that was asked about last
        self._update_ms: dict[_Plan, float] = {}  # by what it takes of the ops that only the optimizer calls

    def called(self, choice: Choice) -> set[str]:
        """The ops that a step under this plan calls."""
        return called_ops(shallow(self._config, 1), choice)

    def times_called(self, choice: Choice, op: str) -> float:
        """How often a step under this plan, which calls the op, makes the calls of it that PyTorch's micro-batch makes;
        1 for an op of the optimizer."""
        if op not in self._in_model:
            return 1.0
        if _plan(choice) not in self._counted:
            self._counted = {_plan(choice): call_counts(self._config, choice)}
        made = self._counted[_plan(choice)].get(op, self._in_model[op])
        return accumulation_steps(self._config.train) * made / self._in_model[op]

    def set_default(self, choice: Choice) -> None:
        """Takes the gradients that every plan has to agree with: this plan's, launched one by one. Then finds out
        whether the whole model can be tried.

        Raises:
            Failed: this plan cannot be built in the run's mode, or computes something else in it.
        """
        launched = self._build(choice, self._check_depth, "eager")
        self._truth = launched.gradients(self._batches[1])
        del launched
        base = self._subject(choice, self._check_depth)
        dtype = compute_dtype(self._config.train.precision)
        tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        floor, most = _DIFFERENCE[dtype], _WORST_DEFAULT * _DIFFERENCE[torch.float16 if tf32 else dtype]
        differences = self._differences(base)
        for name, difference in differences.items():
            if not difference <= most:
                raise Failed(
                    f"{self._mode}, the default's gradient of {name} differs by {difference:.1e} from eager's, "
                    f"allowed {most:.1e}"
                )
        self._allowed = {n: min(max(floor, 4 * d), 2 * most) for n, d in differences.items()}
        if self._on_gpu and self.layers > self._check_depth and self._whole_model_can_be_tried(choice):
            self._weights = deepened(self._config, self._weights)
            self.trial_depth, self.depths = self.layers, (self.layers, self.layers)
            self._kept.clear()

    def duel(self, champion: Choice, op: str, name: str) -> Duel:
        """What one flip saves the whole model. Raises `Failed`."""
        challenger = {**champion, op: name}
        if op not in self._in_model:
            return self._optimizer_duel(champion, challenger)
        self._keep(champion)
        self._check(self._subject(challenger, self._check_depth))
        standing, subject = self._subject(champion), self._subject(challenger)
        growth = self._calls[self.layers][op] / self._calls[self.trial_depth][op]
        scale = growth * accumulation_steps(self._config.train)
        try:
            pairs = self._pairs(standing.run, subject.run, enough="sign")
            gains = [scale * (a - b) for a, b in pairs]
        except Exception as error:
            raise Failed(_failure(error)) from error
        saved = None
        if standing.memory_mib is not None and subject.memory_mib is not None:
            saved = growth * (standing.memory_mib - subject.memory_mib)
        return Duel(*difference_interval(gains), saved)

    def whole(self, choice: Choice, other: Choice, mode: Mode | None = None, *, loss_is_enough: bool = False) -> Match:
        """Two plans in the whole model, the second in another mode if one is given. Raises `Failed`."""
        self._keep(choice, other)
        enough: _Enough = "sign" if mode is not None else "loss" if loss_is_enough else "difference"
        pairs: list[list[tuple[float, float]]] = []
        memory: list[tuple[float | None, float | None]] = []
        for depth in dict.fromkeys(self.depths):
            first, second = self._subject(choice, depth), self._subject(other, depth, mode)
            try:
                pairs.append(self._pairs(first.run, second.run, enough=enough))
            except Exception as error:
                raise Failed(_failure(error)) from error
            memory.append((first.memory_mib, second.memory_mib))
        updates, update_gains = self._updates(choice, other)
        first_times, second_times = (
            self._times(each, [[pair[i] for pair in depth] for depth in pairs], [m[i] for m in memory], updates[i])
            for i, each in enumerate((choice, other))
        )
        gains = self._at_full_depth([[a - b for a, b in depth] for depth in pairs], difference_interval)
        return Match(first_times, second_times, *_sum_of(gains, update_gains))

    def _whole_model_can_be_tried(self, choice: Choice) -> bool:
        """Whether two plans with all layers fit beside each other, and a trial does not take too long."""
        subjects = [self._subject(choice, depth) for depth in self.depths]
        near, far = (self._sample(subject.run, 2) for subject in subjects)
        peak = self._peak_gib([subject.memory_mib for subject in subjects])
        assert peak is not None
        gradients = parameter_count(self._config.model) * 4 / 2**30  # of the second plan
        most = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        return peak + gradients < _FITS * most and near + self._reach * (far - near) < _SLOWEST_MS

    def _times(
        self, choice: Choice, samples: list[list[float]], memory: list[float | None], update: float
    ) -> StepTimes:
        middle, low, high = self._at_full_depth(samples)
        if len(samples) > 1:
            # Where a busy machine makes the deeper model the faster one, the line falls: the whole takes at least as
            # long. So do the ends of its interval.
            least = self._at_full_depth(samples[-1:])
            middle, low, high = (max(pair) for pair in zip(least, (middle, low, high), strict=True))
        return StepTimes(
            choice=dict(choice),
            ms=middle + update,
            ms_low=low + update,
            ms_high=high + update,
            peak_memory_gib=self._peak_gib(memory),
        )

    def _peak_gib(self, memory: list[float | None]) -> float | None:
        """Of the whole model's step, from what was measured at both depths in MiB; None on a CPU."""
        near, far = memory[0], memory[-1]
        if near is None or far is None:
            return None
        return (near + self._reach * (far - near) + _static_mib(self._config)) / 1024

    @property
    def _reach(self) -> float:
        """How far the whole model lies beyond the first depth, in units of the distance between the two."""
        near, far = self.depths
        return (self.layers - near) / (far - near) if far > near else 0.0

    def _at_full_depth(
        self, samples: list[list[float]], interval: Interval = median_interval
    ) -> tuple[float, float, float]:
        """The line through the middles at both depths, in ms of a step, with its 95 % interval.

        The depths are measured independently, so that their errors add up in squares.
        """
        count = accumulation_steps(self._config.train)
        (near, *near_ends), (far, *far_ends) = (interval(each) for each in (samples[0], samples[-1]))
        weights = (1 - self._reach, self._reach) if len(samples) > 1 else (1.0, 0.0)
        middle = weights[0] * near + weights[1] * far
        halves = [(ends[1] - ends[0]) / 2 for ends in (near_ends, far_ends)]
        spread = math.hypot(*(weight * half for weight, half in zip(weights, halves, strict=True)))
        return count * middle, count * (middle - spread), count * (middle + spread)

    def _pairs(
        self, first: Callable[[], object], second: Callable[[], object], *, enough: _Enough = "difference"
    ) -> list[tuple[float, float]]:
        """Times in ms, taken in turns and in changing order, so that a drift of the clock rate meets both."""
        kind = self.device.type
        once = max(self._sample(each, 1) for each in (first, second)) / 1e3
        number = max(1, round(_SAMPLE_SECONDS[kind] / once))
        for _ in range(int(_SETTLING_SECONDS[kind] / (2 * once))):
            first()
            second()
        least, most = _ROUNDS[kind]
        allowed = int(_SECONDS[kind] / (2 * number * once))
        if kind == "cuda":
            allowed = max(allowed, min(_FEW_ROUNDS, int(_FEW_ROUNDS_SECONDS / (2 * number * once))))
        most = max(least, min(most, allowed))
        if first == second:
            most = least  # there is no difference to find, and their time is known well enough
        elif enough == "loss":
            least = min(least, _LOSS_ROUNDS)
        pairs: list[tuple[float, float]] = []
        while len(pairs) < least or (
            len(pairs) < most and ((len(pairs) - least) % _LOOK_EVERY or not _known(pairs, enough))
        ):
            if len(pairs) % 2:
                after = self._sample(second, number)
                pairs.append((self._sample(first, number), after))
            else:
                before = self._sample(first, number)
                pairs.append((before, self._sample(second, number)))
        return pairs

    def _sample(self, run: Callable[[], object], number: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(number):
            run()
        self._synchronize()
        return (time.perf_counter() - start) * 1e3 / number

    def _subject(self, choice: Choice, depth: int | None = None, mode: Mode | None = None) -> Subject:
        """A plan, built unless it is still there."""
        mode = mode or self._mode
        depth = depth or self.trial_depth
        key = (_plan(choice), depth, mode)
        if key not in self._kept:
            self._kept[key] = self._build(choice, depth, mode)
        return self._kept[key]

    def _keep(self, *choices: Choice) -> None:
        """Forgets all plans but these, since each holds the memory of a step's gradients at least."""
        wanted = {_plan(choice) for choice in choices}
        self._kept = {key: subject for key, subject in self._kept.items() if key[0] in wanted}
        release(self.device)

    def _build(self, choice: Choice, depth: int, mode: Mode) -> Subject:
        try:
            pool = self._shared_pool() if mode == "graphs" else None
            model = at_depth(self._config, self._weights, self._load(choice), depth)
            # Compiled and replayed plans share what is compiled, so that another mode can be asked about in seconds:
            # that one would cast weights where the other keeps copies is less than what lies between the two.
            copies_as: Mode = "eager" if mode == "eager" else self._mode
            keep_copies(model, self._config, copies_as)
            timed = depth in self.depths  # else it is checked, and no more
            return Subject(model, self._batches[0], self._scale, mode, pool, takes_memory=timed)
        except Exception as error:  # whatever a plan raises rejects that plan alone
            raise Failed(_failure(error)) from error

    def _shared_pool(self) -> torch.cuda._POOL_HANDLE:
        """One for all plans, so that their activations take turns in the same memory. A pool ends with the last of its
        graphs: one that does next to nothing keeps it."""
        if self._pool is None:
            graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=pool):
                held = torch.zeros((), device=self.device)
            self._pool = (graph, held, pool)
        return self._pool[2]

    def _load(self, choice: Choice) -> Kernels:
        return load_kernels({**default_choice(), **choice}, self._launches)

    def _check(self, subject: Subject) -> None:
        for name, difference in self._differences(subject).items():
            if not difference <= self._allowed[name]:
                raise Failed(
                    f"in the step the gradient of {name} differs by {difference:.1e} from PyTorch's, allowed "
                    f"{self._allowed[name]:.1e}"
                )

    def _differences(self, subject: Subject) -> dict[str, float]:
        """Of every gradient from the default's, relative, on another batch than the one that was captured."""
        try:
            found = subject.gradients(self._batches[1])
        except Exception as error:
            raise Failed(_failure(error)) from error
        names = list(self._truth)
        ratios = [(found[n] - self._truth[n]).norm() / self._truth[n].norm().clamp(min=1e-30) for n in names]
        return dict(zip(names, torch.stack(ratios).tolist(), strict=True))

    def _optimizer_duel(self, champion: Choice, challenger: Choice) -> Duel:
        try:
            _, *steps = self._steps(self._subject(champion), [champion, challenger])
            pairs = self._pairs(*steps, enough="sign")
            return Duel(*difference_interval([a - b for a, b in pairs]), 0.0 if self._on_gpu else None)
        except Exception as error:
            raise Failed(_failure(error)) from error
        finally:
            release(self.device)

    def _updates(self, choice: Choice, other: Choice) -> tuple[tuple[float, float], tuple[float, float, float]]:
        """What the optimizer's update adds to a step under two plans, and what the second saves with its interval, in
        ms. Zero where it calls no ops of the table; what is the same under every plan is left out."""
        nothing = (0.0, 0.0, 0.0)
        ops = (self.called(choice) | self.called(other)) - self._in_model.keys()
        if not ops:
            return (0.0, 0.0), nothing
        try:
            taken = _plan({op: choice.get(op, DEFAULT) for op in ops})
            different = taken != _plan({op: other.get(op, DEFAULT) for op in ops})
            if taken not in self._update_ms or different:
                subject = self._subject(choice, self.depths[-1])
                without, *steps = self._steps(subject, [choice, other] if different else [choice])
            if taken not in self._update_ms:
                # A part of the time that gains are shares of: few rounds tell it well enough.
                pairs = self._pairs(steps[0], without, enough="sign")
                self._update_ms[taken] = max(0.0, median(a - b for a, b in pairs))
            first = self._update_ms[taken]
            if not different:
                return (first, first), nothing
            gains = difference_interval([a - b for a, b in self._pairs(*steps)])
            return (first, max(0.0, first - gains[0])), gains
        except Exception as error:
            raise Failed(_failure(error)) from error
        finally:
            release(self.device)

    def _steps(self, subject: Subject, choices: Sequence[Choice]) -> list[Callable[[], None]]:
        """A step's micro-batches alone, then with the optimizer's update under each of the choices: in training the
        host issues the update while the device is still at the micro-batches."""
        updates = [optimizer_update(self._config, self._load(choice), self._mode) for choice in choices]
        for update in updates * WARM_UP:
            update()

        def micro_batches() -> None:
            for _ in range(accumulation_steps(self._config.train)):
                subject.run()

        def step(update: Callable[[], None]) -> None:
            micro_batches()
            update()

        return [micro_batches, *(functools.partial(step, update) for update in updates)]

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)


def _sum_of(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """Of two medians with their intervals, measured independently: the errors add up in squares."""
    low, high = (math.hypot(a[0] - a[end], b[0] - b[end]) for end in (1, 2))
    return a[0] + b[0], a[0] + b[0] - low, a[0] + b[0] + high


def _known(pairs: list[tuple[float, float]], enough: _Enough) -> bool:
    middle, low, high = difference_interval([a - b for a, b in pairs])
    is_clear = abs(middle) > _CLEAR * (high - low) / 2
    if is_clear and (enough == "sign" or (enough == "loss" and middle < 0)):
        return True
    return high - low <= 2 * _PRECISE * median(a for a, _ in pairs)


def _static_mib(config: Config) -> float:
    """Parameters and the optimizers' states: gradients are measured with the activations."""
    return 4 * (parameter_count(config.model) + state_elements(config.model, config.optimizer)) / 2**20


def _plan(choice: Choice) -> _Plan:
    return tuple(sorted(choice.items()))


def _failure(error: Exception) -> str:
    status, reason = classify(error)
    words = status.replace("_", " ")
    return reason if reason.startswith(words) else f"{words} in the step: {reason}"
