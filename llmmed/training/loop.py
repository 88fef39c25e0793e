"""The training loop: steps, evaluation, checkpoints, and what is told on the way."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from llmmed.autotune.plan import Mode
from llmmed.compose import accumulation_steps, as_dict
from llmmed.config import Config
from llmmed.data import Batches, Dataset
from llmmed.data.tokenizer import SETTINGS
from llmmed.errors import UserError
from llmmed.files import finite, read_metrics, write_atomically
from llmmed.model import Transformer, flops_per_token
from llmmed.optim import learning_rate
from llmmed.run_folder import shown
from llmmed.signals import Interrupted, StopRequest
from llmmed.training import checkpoint, memory
from llmmed.training.evaluate import Best, Evaluator
from llmmed.training.executed import launched_kernels, prepare_tracing
from llmmed.training.in_flight import InFlight, Reading
from llmmed.training.metrics import JsonLines, SampleSink, Sink, draw_loss, peak_tflops
from llmmed.training.micro_step import build_micro_step
from llmmed.training.prefetch import Prefetcher
from llmmed.training.profiling import StepTrace
from llmmed.training.progress import TrainingProgress
from llmmed.training.result import Result
from llmmed.training.samples import Sampler, one_line
from llmmed.training.step import Stepper

logger = logging.getLogger(__name__)

_OF_A_RUN = ("metrics.jsonl", "samples.jsonl", "summary.json", "loss.png", "trace.json.gz")
_TRACED_STEP = 2  # after the first of this process: compiled and captured, and early enough to matter


def train(
    config: Config,
    model: Transformer,
    dataset: Dataset,
    folder: Path,
    *,
    plan: Mapping[str, Any],
    mode: Mode,
    sinks: Sequence[Sink],
    console: Console,
    started: float,
    resume: Path | None,
    launched: Callable[[set[str]], Mapping[str, Any]] | None = None,
    stop: StopRequest | None = None,
) -> Result:
    """Trains to `train.max_steps`.

    Args:
        config: The run's.
        model: On its device.
        dataset: Prepared.
        folder: The run folder: checkpoints, metrics.jsonl, loss.png and the tokenizer go there.
        plan: The kernel plan as JSON, kept in every checkpoint.
        mode: How the step runs.
        sinks: Take the metrics as well.
        console: For progress.
        started: `time.perf_counter()` at the start of the process.
        resume: The checkpoint to go on from; whoever calls knows that it is whole and of this data. None starts at
            step 1.
        launched: On a GPU, told once the names of all kernels that a step launches. Returns the plan with what they
            say, for checkpoints from then on; what it raises ends the run.
        stop: Entered already. After the first step it waits for the end of a step; without one, there is one for this.

    Raises:
        Interrupted: SIGTERM or SIGINT came; a checkpoint is written if a step was made.
        UserError: out of memory; or the gradients are not finite any more.
    """
    if dataset.tokenizer_file is not None:
        for name in ("tokenizer.json", SETTINGS):
            write_atomically(folder / name, dataset.tokenizer_file.with_name(name).read_bytes())
    with memory.advised(config.train):
        run = _Run(config, model, dataset, folder, plan, mode, sinks, started, launched)
        first = 0 if resume is None else run.restore(checkpoint.load(resume))
    aside = None if first else checkpoint.set_aside(folder / "checkpoints", with_files=_OF_A_RUN)
    progress = TrainingProgress(console, first, config.train.max_steps)
    if aside is not None:
        progress.note(f"starts at step 1; the run that was here is in {shown(aside)}")
    if first:
        progress.note(f"going on from the checkpoint of step {first}")
    if config.optimizer.warmup_steps > config.train.max_steps:
        progress.note(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} is more than train.max_steps="
            f"{config.train.max_steps}: the rate does not reach optimizer.lr; give fewer"
        )
    if first >= config.train.max_steps:
        progress.note(f"that is all of train.max_steps={config.train.max_steps}; give a larger one to train on")
    try:
        requested = StopRequest() if stop is None else contextlib.nullcontext(stop)
        with memory.advised(config.train), requested as request, progress:
            run.loop(first, request, progress)
        run.warn_of_no_trace()
    finally:
        run.close()
        if stop is not None:
            stop.waits, stop.moment = False, "after training"
    return run.result()


class _Run:
    """The state of one training run."""

    def __init__(
        self, config: Config, model: Transformer, dataset: Dataset, folder: Path, plan: Mapping[str, Any], mode: Mode,
        sinks: Sequence[Sink], started: float, launched: Callable[[set[str]], Mapping[str, Any]] | None,
    ) -> None:  # fmt: skip
        self.config, self.model, self.dataset, self.folder = config, model, dataset, folder
        self.plan, self.sinks, self.started = plan, sinks, started
        self.device = next(model.parameters()).device
        self.launched = launched if self.device.type == "cuda" else None
        self.count = accumulation_steps(config.train)
        self.stepper = Stepper(model, build_micro_step(model, config, mode), config)
        self.evaluator = Evaluator(model, dataset, config.train)
        self.sampler: Sampler | None = None
        self.batches = Batches(
            dataset.train, config.train.seq_len, config.train.micro_batch_size, config.seed, shuffle=True,
            name=f"the training part of data={dataset.name}",
        )  # fmt: skip
        self.peak = peak_tflops(self.device, config.train.precision)
        self.flops = flops_per_token(config.model, config.train.seq_len)
        self.file: JsonLines | None = None
        self.trace: StepTrace | None = None
        self.seconds_before = 0.0
        self.first_step_seconds = 0.0
        self.speeds: list[float] = []  # tokens a second, of each log interval after the first
        self.speed_before: float | None = None  # of the run so far, when this process began
        self.last: dict[str, float] = {}
        self.losses: list[Tensor] = []  # of the steps since the last log step
        self.in_flight = InFlight(self.device)
        self.best = Best()
        self.first = self.done = 0  # steps behind it when this process began, and now
        self.tokens_before = 0  # trained on when this process began: steps may have had another size
        self.owed = False  # what was due after the last step: a stopped run leaves it to the one that goes on
        self.training_seconds = 0.0

    def restore(self, found: checkpoint.Checkpoint) -> int:
        """Takes over a checkpoint's state. Returns the number of steps it has behind it."""
        self.model.load_state_dict(found.model)
        self.stepper.restore(found.optimizer, scaled=found.state["config"]["train"]["precision"] == "fp16")
        tokens_a_step = found.state["config"]["train"]["global_batch_tokens"]
        self.tokens_before = found.state.get("tokens", found.step * tokens_a_step)
        self.seconds_before = self.training_seconds = found.state["training_seconds"]
        self.first_step_seconds = found.state.get("first_step_seconds", 0.0)  # of the process that made a step last
        self.last = {name: _or_nan(value) for name, value in found.state["last_metrics"].items()}
        self.speed_before = found.state.get("tokens_per_second", self.last.get("tokens_per_second"))
        self.best = Best(**found.state["best"])
        self.owed = found.state["owed"]
        self.losses = [torch.tensor(_or_nan(loss), device=self.device) for loss in found.state["losses"]]
        self.first = self.done = found.step
        return found.step

    def loop(self, first: int, stop: StopRequest, progress: TrainingProgress) -> None:
        train = self.config.train
        self.file = JsonLines(self.folder / "metrics.jsonl", from_step=first, owed=self.owed)
        if train.sample_every and self.dataset.tokenizer_file is None:
            progress.note(f"train.sample_every={train.sample_every}: data={self.dataset.name} has no text to sample")
        elif train.sample_every:
            self.sampler = Sampler(self.model, self.dataset, self.config, self.folder, from_step=first, owed=self.owed)
            for cut in self.sampler.cut_prompts():
                progress.note(cut)
        trace = self.trace = StepTrace(
            self.folder / "trace.json.gz", train.profile_steps, first, train.max_steps, self.device
        )
        if self.device.type == "cuda" and (self.launched is not None or train.profile_steps):
            prepare_tracing(self.device)
        if self.owed:
            stop.waits = True
            self.owed = False
            self._evaluate_and_sample(first, stop, progress)
            self._save(first)
            if first < train.max_steps or self.owed:
                stop.wait_no_more()
        begun = time.perf_counter()
        with Prefetcher(self.batches, self._windows_of(first, train.max_steps), self.device) as source:
            for step in range(first, train.max_steps):
                if 0 < train.patience <= self.best.waited:
                    count = f"{self.best.waited} evaluation{'s' if self.best.waited > 1 else ''}"
                    progress.note(f"step {step}: {count} without a better validation loss")
                    return
                try:
                    told = self._issue(step, source, trace, stop, progress)
                except Exception:
                    # First what finished steps have to tell, which may be that the training broke down before.
                    with contextlib.suppress(RuntimeError):  # a device that has failed fails at this too
                        self._log_finished(progress)
                    raise
                done = self.done
                self._log_finished(progress, left=min(train.log_every, train.max_skipped_steps))
                paused = self._evaluate_and_sample(done, stop, progress)
                stopping = stop.name  # read once: a signal that comes later waits for the next step
                due = train.checkpoint_every and done % train.checkpoint_every == 0
                ends = done == train.max_steps or 0 < train.patience <= self.best.waited
                if due or ends or stopping or (train.keep_best and self.best.step == done):
                    paused = True
                    self._log_finished(progress)
                    self.training_seconds = self.seconds_before + time.perf_counter() - begun
                    self._save(done)
                if paused or told:
                    self.in_flight.restart(done)
                if stopping and (done < train.max_steps or self.owed):
                    raise Interrupted(f"{stopping} after step {done}; its checkpoint is written")

    def _issue(
        self, step: int, source: Prefetcher, trace: StepTrace, stop: StopRequest, progress: TrainingProgress
    ) -> str | None:
        """Issues a step and keeps track of it. Returns what was told of a trace that ended with it."""
        trace.before(step)
        traced = self.launched is not None and step >= self.first + _TRACED_STEP and not trace.recording
        loss, norm = self._step(step, source, traced=traced)
        done = self.done = step + 1
        if traced:
            self.in_flight.restart(done)
        progress.advance(done)
        if step == self.first:
            self._synchronize()
            self.first_step_seconds = time.perf_counter() - self.started
            self.in_flight.restart(done)
            stop.waits = True  # from here on there is something to lose
        told = trace.after(done)
        if told:
            progress.note(told)
        self._keep_track(done, loss, norm)
        return told

    def _step(self, step: int, source: Prefetcher, *, traced: bool) -> tuple[Tensor, Tensor]:
        """One optimizer step: its loss and gradient norm. A traced one also tells which kernels it launched."""

        def run() -> tuple[Tensor, Tensor]:
            return self.stepper.run(step, (source.next() for _ in range(self.count)), self.count)

        if self.launched is None or not traced:
            return run()
        results: list[tuple[Tensor, Tensor]] = []
        names = launched_kernels(lambda: results.append(run()))
        launched, self.launched = self.launched, None
        self.plan = launched(names)
        return results[0]

    def _evaluate_and_sample(self, done: int, stop: StopRequest, progress: TrainingProgress) -> bool:
        """What is due after `done` steps, and whether anything was. A run that is to stop leaves it owed."""
        train = self.config.train
        evaluates = done == train.max_steps or (train.eval_every > 0 and done % train.eval_every == 0)
        samples = self.sampler is not None and done % train.sample_every == 0
        if not (evaluates or samples):
            return False
        self._log_finished(progress)
        found = self.evaluator.run(lambda: stop.name is not None) if evaluates else {}
        if stop.name is not None:  # also if it came after the last batch: what is owed is done as a whole
            self.owed = True
            return True
        if found:
            self._see(done, found, progress)
        if samples:
            self._sample(done, progress)
        return True

    def _see(self, done: int, found: dict[str, float], progress: TrainingProgress) -> None:
        self.last |= found
        self._write(done, found)
        improved = self.best.see(done, found["val/loss"])
        progress.note(f"step {done}: validation loss {found['val/loss']:.4f}{', the best so far' if improved else ''}")

    def _sample(self, done: int, progress: TrainingProgress) -> None:
        assert self.sampler is not None
        samples = self.sampler.run(done)
        progress.note(f"step {done}: {one_line(samples)}")
        for sink in self.sinks:
            if isinstance(sink, SampleSink):
                sink.log_samples(samples, done)

    def warn_of_no_trace(self) -> None:
        """Where nothing shows which kernels a step launched, of this process or of one before it."""
        if self.launched is None or self.done == self.first or self.plan.get("executed"):
            return
        why = "train.profile_steps took them all" if self.config.train.profile_steps else "too few were made"
        logger.warning("no step was traced, so that nothing shows that the chosen kernels ran: %s", why)

    def close(self) -> None:
        if self.trace is not None:
            self.trace.write(self.done)  # of a run that ended while it was recorded
        if self.sampler is not None:
            self.sampler.close()
        if self.file is not None:
            self.file.close()
            metrics = read_metrics(self.folder / "metrics.jsonl")
            if metrics:
                draw_loss(metrics, self.folder / "loss.png")

    def result(self) -> Result:
        speed = self._median_speed()
        return Result(
            steps=self.done,
            train_loss=self.last.get("loss", float("nan")),
            val_loss=self.last.get("val/loss", float("nan")),
            val_accuracy=self.last.get("val/accuracy", float("nan")),
            best_val_loss=self.best.loss if self.best.step else float("nan"),
            best_step=self.best.step,
            tokens_per_second=speed,
            mfu=self._mfu(speed),
            peak_memory_gib=self._memory_gib() if self.done > self.first else self.last.get("memory_gib"),
            training_time_seconds=self.training_seconds,
            time_to_first_step_seconds=self.first_step_seconds,
            skipped_steps=int(self.stepper.skipped),
            diverged=not math.isfinite(self.last.get("val/loss", 0.0)),
        )

    def _keep_track(self, done: int, loss: Tensor, norm: Tensor) -> None:
        """A step was issued; of a log step the values are copied, and now and then how many were skipped in a row."""
        train = self.config.train
        self.losses.append(loss)
        in_a_row = {"skipped_in_a_row": self.stepper.skipped_in_a_row}
        if done % train.log_every and done not in (1, train.max_steps):
            self.in_flight.add(done, None if done % train.max_skipped_steps else in_a_row, timed=False)
            return
        values = {
            "loss": _mean_of_finite(torch.stack(self.losses)),
            "grad_norm": norm,
            "skipped_steps": self.stepper.skipped,
            "loss_scale": self.stepper.scale,
            **in_a_row,
        }
        self.in_flight.add(done, values, self._memory_gib())
        self.losses.clear()

    def _log_finished(self, progress: TrainingProgress, left: int = 0) -> None:
        """Logs what finished steps have to tell. Waits while more than `left` are unfinished."""
        for reading in self.in_flight.finished(left):
            self._log(reading, progress)

    def _log(self, reading: Reading, progress: TrainingProgress) -> None:
        """What a log step had to tell. Raises `UserError` if by any step's reading too many in a row were skipped."""
        values, train, step = reading.values, self.config.train, reading.step - 1
        in_a_row = values["skipped_in_a_row"]
        if in_a_row >= train.max_skipped_steps:
            raise UserError(
                f"training broke down at step {reading.step}: loss or gradients of {in_a_row:.0f} steps in a row were "
                f"not finite; lower optimizer.lr={self.config.optimizer.lr:g}, or use train.precision=bf16 or fp32; "
                f"the batch is in {self._keep_batch(step)}"
            )
        if "loss" not in values:  # it was read for that alone
            return
        if reading.steps_per_second is not None:
            self.speeds.append(reading.steps_per_second * train.global_batch_tokens)
        speed = self.speeds[-1] if self.speeds else None
        metrics = {
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "lr": learning_rate(step, self.config.optimizer, train.max_steps),
            "tokens": float(self._tokens(reading.step)),
            "skipped_steps": values["skipped_steps"],
            **({"loss_scale": values["loss_scale"]} if train.precision == "fp16" else {}),
            **({"tokens_per_second": speed} if speed is not None else {}),
        }
        if (mfu := self._mfu(speed)) is not None:
            metrics["mfu"] = mfu
        if reading.memory_gib is not None:
            metrics["memory_gib"] = reading.memory_gib
        self.last |= metrics
        self._write(reading.step, metrics)
        progress.show(reading.step, metrics)

    def _keep_batch(self, step: int) -> str:
        """Writes the tokens of a step that was skipped, [sequences, seq + 1]; returns where."""
        tokens = torch.cat([self.batches.beginning(first) for first in self._windows_of(step, step + 1)])
        path = self.folder / "bad_batch.safetensors"
        write_atomically(path, save({"tokens": tokens}, metadata={"step": str(step + 1)}))
        return shown(path)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self.file is not None
        self.file.write(step, metrics)
        for sink in self.sinks:
            sink.log(metrics, step)

    def _save(self, step: int) -> None:
        state = {
            "config": as_dict(self.config),
            "plan": self.plan,
            "data": self.dataset.fingerprint,
            "tokens": self._tokens(step),
            "training_seconds": self.training_seconds,
            "first_step_seconds": self.first_step_seconds,
            "tokens_per_second": self._median_speed(),
            "last_metrics": finite(self.last),
            "best": asdict(self.best),
            "owed": self.owed,
            "losses": finite(torch.stack(self.losses).tolist()) if self.losses else [],
        }
        model = self.model.state_dict()
        keep = self.config.train.keep_last
        best = self.best.step or None if self.config.train.keep_best else None
        checkpoint.save(self.folder / "checkpoints", step, model, self.stepper.tensors(), state, keep, best)

    def _tokens(self, step: int) -> int:
        """Trained on after `step` steps, of this process and of those before it."""
        return self.tokens_before + (step - self.first) * self.config.train.global_batch_tokens

    def _windows_of(self, begin: int, end: int) -> range:
        """The first window of each micro-batch of steps `begin` to `end`, by its number in the data."""
        first, last = (self._tokens(step) // self.config.train.seq_len for step in (begin, end))
        return range(first, last, self.config.train.micro_batch_size)

    def _median_speed(self) -> float | None:
        """In tokens a second, over this process's log intervals; before there are any, what was told last."""
        return statistics.median(self.speeds) if self.speeds else self.speed_before

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        if self.peak is None or tokens_per_second is None:
            return None
        return tokens_per_second * self.flops / (self.peak * 1e12)

    def _memory_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _mean_of_finite(losses: Tensor) -> Tensor:
    """Of losses [n], 0-d: one step that overflowed, and was skipped, says nothing about the others. NaN without any."""
    return losses.where(losses.isfinite(), math.nan).nanmean()


def _or_nan(value: float | None) -> float:
    """JSON has null where the value was not finite."""
    return math.nan if value is None else value
