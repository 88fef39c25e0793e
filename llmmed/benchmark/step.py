"""Compares whole training steps: every contestant in a process of its own, one at a time, in rounds.

In every second round the order is reversed, so that a drift of the clock rate or a busy neighbour meets all of them. In
its first round a contestant finds empty compiler caches, later its own.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from llmmed.autotune.intervals import median_interval
from llmmed.benchmark.contestants import CONTESTANTS, Contestant
from llmmed.benchmark.results import StepRow, StepShape
from llmmed.benchmark.settings import ALL, StepSettings, config_of
from llmmed.benchmark.step_worker import StepFound, StepJob
from llmmed.compose import accumulation_steps
from llmmed.config import Config
from llmmed.model import flops_per_token, parameter_count
from llmmed.processes import how_it_ended, last_line, started_process

if TYPE_CHECKING:
    from llmmed.benchmark.ops import Tell

# From equal weights on equal batches, in 16 bits, where one rounds more often than another. Two mistakes that a rival
# could make, a rotary of other pairs and a loss over other targets, move the first norm by far more. A loss hardly
# tells whether the weights are updated as the others' are; the size of the updates does.
_COMPARED = (
    ("first_loss", "loss of the first step", 0.002),
    ("first_gradient_norm", "gradient norm of the first step", 0.02),
    ("update_rms", "size of the first steps' updates", 0.05),
    ("last_loss", "loss of the last warm-up step", 0.02),
)
_LAST_LOSS_WITH_MUON = 0.06  # plain's fused matrices are one matrix to it each: 1 % after six steps at 0.002
_FIRST_PROCESS_SECONDS = 30.0  # at least, on a GPU; none is started to be stopped before it has compiled
_WARM_FIRST_STEP_SECONDS = 15.0
_AS_RIVALS_TRAIN = ("optimizer.schedule=constant", "optimizer.warmup_steps=0")


def run_step(
    settings: StepSettings, overrides: Sequence[str], folder: Path, tell: Tell
) -> Iterator[tuple[list[StepShape], list[StepRow]]]:
    """Everything that the settings ask for, within their time; gives what is known after every process.

    The log of every process goes into the folder, and the kernel plan of ours.
    """
    deadline = time.perf_counter() + settings.seconds
    sizes: list[str | None] = [*settings.sizes] or [None]
    entries = [
        _Entry(contestant, size, config_of(size, None, overrides, contestant.overrides))
        for contestant in _chosen(settings)
        for size in sizes
    ]
    shapes = [_shape(config_of(size, None, overrides)) for size in sizes]
    by_size = sorted(entries, key=lambda entry: sizes.index(entry.size))
    with tempfile.TemporaryDirectory(prefix="llmmed-step-") as caches:
        for number in range(settings.rounds):
            for index, entry in enumerate(entries if number % 2 == 0 else entries[::-1]):
                done, who = number + index / len(entries), f"{entry.config.model.name}: {entry.contestant.title}"
                tell(done / settings.rounds, f"round {number + 1} of {settings.rounds}, {who}")
                entry.run(settings, overrides, folder, Path(caches), number, deadline)
                yield shapes, _compared([each.row() for each in by_size], entry.config.optimizer.name)
    tell(1.0, "done")


def _chosen(settings: StepSettings) -> list[Contestant]:
    if ALL in settings.contestants:
        return list(CONTESTANTS)
    return [next(each for each in CONTESTANTS if each.name == name) for name in settings.contestants]


@dataclass
class _Entry:
    """A contestant at a size, and what its processes found."""

    contestant: Contestant
    size: str | None
    config: Config
    found: list[StepFound] = field(default_factory=list)
    failure: StepFound | None = None
    seconds: float = 0.0  # that its last process took

    def run(
        self, settings: StepSettings, overrides: Sequence[str], folder: Path, caches: Path, number: int, deadline: float
    ) -> None:
        """One process, unless it has failed before, cannot run here, or there is no time left."""
        if self.failure is not None:
            return
        if reason := self.contestant.why_not(self.config.device):
            self.failure = StepFound(status="unavailable", reason=reason)
            return
        left = deadline - time.perf_counter()
        if left < self._least_seconds(settings):
            if not self.found:
                self.failure = StepFound(status="not_tried", reason=f"seconds={settings.seconds:g} was used up")
            return
        limit = min(left, self._most_seconds(settings))
        begun = time.perf_counter()
        found = self._process(settings, overrides, folder, caches, number, limit)
        self.seconds = time.perf_counter() - begun
        if found.status == "verified":
            self.found.append(found)
        elif found.status != "timed_out" or not self.found:
            self.failure = found

    def _least_seconds(self, settings: StepSettings) -> float:
        """What must be left to start a process. Its first step finds the compilers' caches filled in a later round."""
        if not self.found:
            return min(_FIRST_PROCESS_SECONDS, settings.seconds / 2)
        cold = self.found[-1].first_step_seconds or 0.0
        return self.seconds - cold + min(cold, _WARM_FIRST_STEP_SECONDS)

    def _most_seconds(self, settings: StepSettings) -> float:
        """Of one process. Tuning comes on top: it has the budget that it has in training."""
        kernels = self.config.kernels
        tunes = self.contestant.family == "ours" and kernels.policy == "auto"
        return settings.contestant_seconds + (kernels.budget_seconds if tunes else 0.0)

    def _process(
        self, settings: StepSettings, overrides: Sequence[str], folder: Path, caches: Path, number: int, limit: float
    ) -> StepFound:
        name = f"{self.config.model.name}_{self.contestant.name}"
        log, result = folder / f"{name}_{number + 1}.log", caches / f"{name}_{number}.json"
        own = [*(o for o in overrides if not o.startswith("sizes=")), *([f"model={self.size}"] if self.size else [])]
        own += [*self.contestant.overrides, *_AS_RIVALS_TRAIN]
        variables = {
            "TORCHINDUCTOR_CACHE_DIR": str(caches / name / "inductor"),
            "TRITON_CACHE_DIR": str(caches / name / "triton"),
            "LLMMED_CACHE": str(caches / name / "llmmed"),
            "HF_HUB_OFFLINE": "1",
        }
        job = caches / f"{name}_{number}.job"
        plan = folder / f"{name}_kernels.json"
        StepJob(contestant=self.contestant.name, overrides=own, started=time.time(), result=result, plan=plan).write(
            job
        )
        with started_process("llmmed.benchmark.step_worker", [str(job)], log, variables) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)
            ended = process.poll()
        if result.exists():
            return StepFound.read(result)
        if ended is None:
            key = "contestant_seconds" if limit == self._most_seconds(settings) else "seconds"
            return StepFound(status="timed_out", reason=f"{key}={getattr(settings, key):g} was used up")
        words = last_line(log)
        return StepFound(status="crashed", reason=f"the process {how_it_ended(ended)}{f': {words}' if words else ''}")

    def row(self) -> StepRow:
        config, title = self.config, self.contestant.title
        row = StepRow(contestant=self.contestant.name, title=title, size=config.model.name, status="verified")
        if not self.found:
            missing = self.failure or StepFound(status="not_tried", reason="the benchmark ended before it")
            return row.model_copy(update={"status": missing.status, "reason": missing.reason})
        first = self.found[0]
        samples = [sample for found in self.found for sample in found.samples]
        # Blocks of a process are more alike than processes are: of several, each counts once.
        rounds = [median(found.samples) for found in self.found]
        speed, low, high = median_interval(rounds if len(rounds) > 1 else samples)
        memory = [found.peak_memory_gib for found in self.found if found.peak_memory_gib is not None]
        again = [found.first_step_seconds for found in self.found[1:] if found.first_step_seconds is not None]
        flops = flops_per_token(config.model, config.train.seq_len)
        reason = f"in a later round: {self.failure.reason}" if self.failure is not None else first.reason
        update = {
            "reason": reason,
            "rounds": len(self.found),
            "tokens_per_second": speed,
            "tokens_per_second_low": low,
            "tokens_per_second_high": high,
            "step_ms": 1e3 * config.train.global_batch_tokens / speed,
            "mfu": speed * flops / (first.peak_tflops * 1e12) if first.peak_tflops else None,
            "peak_memory_gib": max(memory) if memory else None,
            "first_step_seconds": first.first_step_seconds,
            "first_step_again_seconds": median(again) if again else None,
            "samples": samples,
        }
        computed = ("first_loss", "first_gradient_norm", "last_loss", "update_rms")
        told = (*computed, "device_ms", "largest_kernels", "kernels")
        return row.model_copy(update=update | {name: getattr(first, name) for name in told})


def _compared(rows: list[StepRow], optimizer: str = "adamw") -> list[StepRow]:
    """Whoever does not compute what the others compute has no place in the comparison."""
    checked = []
    for row in rows:
        ran = [each for each in rows if each.size == row.size and each.first_loss is not None]
        problem = _problem(row, ran, optimizer) if row.first_loss is not None else None
        if problem is None:
            checked.append(row)
        else:
            empty = StepRow(contestant=row.contestant, title=row.title, size=row.size, status="wrong", reason=problem)
            checked.append(empty)
    return checked


def _problem(row: StepRow, ran: Sequence[StepRow], optimizer: str) -> str | None:
    """How far a contestant's losses lie from those of the reference, if that is too far."""
    reference = _reference(ran, optimizer)
    difference = _difference(row, reference, optimizer)
    if difference is None or len(ran) >= 3:
        return difference
    return f"differs from {reference.title}: {difference}; of two, either may be wrong"


def _reference(ran: Sequence[StepRow], optimizer: str) -> StepRow:
    """Whom the others are held against: of those that do not come from here, the first with whom most agree."""
    rivals = [row for row in ran if not row.contestant.startswith("ours_")] or ran
    return max(rivals, key=lambda rival: sum(_difference(row, rival, optimizer) is None for row in ran))


def _difference(row: StepRow, reference: StepRow, optimizer: str) -> str | None:
    for name, what, usual in _COMPARED:
        tolerance = _LAST_LOSS_WITH_MUON if name == "last_loss" and optimizer == "muon" else usual
        own, other = getattr(row, name), getattr(reference, name)
        if own is not None and other is not None and not abs(own - other) <= tolerance * abs(other):
            return f"{what} {own:.5g}; that of {reference.title} is {other:.5g}"
    return None


def _shape(config: Config) -> StepShape:
    return StepShape(
        size=config.model.name,
        parameters=parameter_count(config.model),
        batch=config.train.micro_batch_size,
        seq_len=config.train.seq_len,
        micro_batches=accumulation_steps(config.train),
        vocabulary=config.model.vocab_size,
        precision=config.train.precision,
        optimizer=config.optimizer.name,
    )
