"""One contestant of `benchmark=step`, in a process of its own: trains, times blocks of steps, profiles, writes a file.

`step.py` starts it with the path of its job.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from llmmed import compose
from llmmed.autotune.failures import classify, one_line
from llmmed.autotune.plan import Status
from llmmed.benchmark.contestants import CONTESTANTS, Contestant, Trainee, build
from llmmed.benchmark.profiled_groups import measure_breakdown
from llmmed.benchmark.settings import StepSettings, compose_benchmark
from llmmed.compose import accumulation_steps
from llmmed.config import Config
from llmmed.errors import UserError
from llmmed.files import write_atomically
from llmmed.processes import end_with_parent

_BATCHES = 4  # different ones, in turns


_SCALE_TRIES = 12  # of the first step in fp16, each with half the loss scale


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class StepJob(_Frozen):
    """What the process is to do; `started` is the `time.time()` of its start. `plan` is where ours leaves its plan."""

    contestant: str
    overrides: list[str]
    started: float
    result: Path
    plan: Path

    def write(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json())


class StepFound(_Frozen):
    """What one process found out; the numbers as in `results.StepRow`."""

    status: Status
    reason: str = ""
    samples: list[float] = Field(default_factory=list)  # tokens/s
    peak_memory_gib: float | None = None
    peak_tflops: float | None = None  # of the device
    first_step_seconds: float | None = None
    first_loss: float | None = None
    first_gradient_norm: float | None = None
    last_loss: float | None = None
    update_rms: float | None = None
    device_ms: dict[str, float] | None = None
    largest_kernels: dict[str, float] | None = None
    kernels: dict[str, str] | None = None

    @classmethod
    def read(cls, path: Path) -> StepFound:
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def main() -> None:
    job = StepJob.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    end_with_parent()
    compose.register()
    contestant = next(each for each in CONTESTANTS if each.name == job.contestant)
    try:
        settings, config = compose_benchmark(own=job.overrides)
        assert isinstance(settings, StepSettings)
        found = compete(contestant, settings, config, job)
    except UserError as error:
        found = StepFound(status="crashed", reason=str(error))
    except Exception as error:  # noqa: BLE001 - whatever a contestant raises puts that contestant alone out
        status, reason = classify(error)
        found = StepFound(status=status, reason=reason)
    write_atomically(job.result, found.model_dump_json())
    os._exit(0)  # at once: what a contestant left behind, say a thread, must not hold the process


def compete(contestant: Contestant, settings: StepSettings, config: Config, job: StepJob) -> StepFound:
    """Builds, trains and measures. Its times are on disk before it is profiled. Raises what the contestant raises."""
    from llmmed.training.metrics import peak_tflops

    device = torch.device(config.device)
    trainee = build(contestant, config)
    if trainee.plan is not None:
        trainee.plan.write(job.plan)
    steps = _Steps(trainee, _batches(config, device), device)
    copying = time.time()
    before = [parameter.detach().to("cpu", copy=True) for parameter in trainee.parameters]
    copying = time.time() - copying
    loss, norm = steps.run(1)
    first_step_seconds = time.time() - job.started - trainee.excluded_seconds - copying
    if config.train.precision == "fp16":
        loss, norm = _until_the_scale_fits(steps, loss, norm)
    first_loss, first_norm = loss.item(), norm.item()
    if settings.warm_up_steps:
        loss, _ = steps.run(settings.warm_up_steps)
    last_loss, update_rms = loss.item(), _distance(before, trainee.parameters)
    del before
    if reason := _not_finite({"first loss": first_loss, "first gradient norm": first_norm, "last loss": last_loss}):
        return StepFound(status="wrong", reason=reason)
    settling = time.perf_counter()
    while time.perf_counter() - settling < settings.warm_up_seconds:
        steps.run(settings.block_steps)
    samples = []
    for _ in range(settings.blocks):
        begun = time.perf_counter()
        loss, _ = steps.run(settings.block_steps)
        samples.append(settings.block_steps * config.train.global_batch_tokens / (time.perf_counter() - begun))
    if reason := _not_finite({"last loss": loss.item()}):
        return StepFound(status="wrong", reason=reason)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    found = StepFound(
        status="verified",
        samples=samples,
        peak_memory_gib=memory,
        peak_tflops=peak_tflops(device, config.train.precision),
        first_step_seconds=first_step_seconds,
        first_loss=first_loss,
        first_gradient_norm=first_norm,
        last_loss=last_loss,
        update_rms=update_rms,
        kernels=trainee.plan.choice if trainee.plan is not None else None,
    )
    if not settings.profile_steps:
        return found
    unfinished = found.model_copy(update={"reason": "not profiled: the profiler did not end"})
    write_atomically(job.result, unfinished.model_dump_json())
    try:
        with trainee.annotated():
            steps.run(1)
            measured = measure_breakdown(steps.one, settings.profile_steps, device)
    except Exception as error:  # noqa: BLE001 - whatever the profiler raises, the times are good
        return found.model_copy(update={"reason": f"not profiled: {one_line(error)}"})
    return found.model_copy(update={"device_ms": measured.groups, "largest_kernels": measured.largest})


def _distance(before: list[torch.Tensor], now: list[torch.Tensor]) -> float:
    """By how much all weights together have changed, root mean square."""
    squares = sum(((new.detach().cpu() - old) ** 2).sum().item() for old, new in zip(before, now, strict=True))
    return float((squares / sum(old.numel() for old in before)) ** 0.5)


def _not_finite(values: Mapping[str, float]) -> str:
    """What cannot have come from training; empty if all is well."""
    return ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))


def _until_the_scale_fits(steps: _Steps, loss: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first step again while its gradients overflow: such a step changes the loss scale alone."""
    for _ in range(_SCALE_TRIES):
        if math.isfinite(norm.item()) or not math.isfinite(loss.item()):
            break
        loss, norm = steps.first_again()
    return loss, norm


class _Steps:
    """Steps one after another; the host waits for the device only after the last of a call."""

    def __init__(self, trainee: Trainee, batches: list[list[torch.Tensor]], device: torch.device) -> None:
        self._trainee, self._batches, self._device = trainee, batches, device
        self._index = 0

    def one(self) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._trainee.step(self._index, self._batches[self._index % len(self._batches)])
        self._index += 1
        return found

    def first_again(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._index = 0
        return self.run(1)

    def run(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = (torch.empty(0), torch.empty(0))
        for _ in range(count):
            found = self.one()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return found


def _batches(config: Config, device: torch.device) -> list[list[torch.Tensor]]:
    """Random tokens, the same for every contestant: [micro-batch, seq + 1]."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.train.micro_batch_size, config.train.seq_len + 1)
    return [
        [
            torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
            for _ in range(accumulation_steps(config.train))
        ]
        for _ in range(_BATCHES)
    ]
