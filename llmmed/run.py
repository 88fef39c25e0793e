"""One run: compose -> validate -> workload -> verify -> measure -> choose -> build -> train -> record.

`cli` composes and validates. `tune` verifies, measures and chooses, in a process of its own. Read this file first.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from llmmed import collector, consoles, continuation, data, init_from, run_folder
from llmmed.autotune.child import processes_to_come
from llmmed.autotune.plan import KernelPlan
from llmmed.autotune.tuner import refuse, tune
from llmmed.autotune.workload import called_ops, record_workload
from llmmed.compose import as_dict
from llmmed.config import Config
from llmmed.errors import UserError, in_words
from llmmed.files import finite, write_json
from llmmed.init_from import InitialWeights
from llmmed.kernels.base import Unavailable
from llmmed.kernels.catalog import load_kernels
from llmmed.model import Transformer
from llmmed.plan_of_checkpoint import plan_of_checkpoint
from llmmed.reporting.kernel_table import print_kernel_table
from llmmed.reporting.terminal import print_closing, print_header, telling_of_tuning
from llmmed.reporting.wandb_sink import open_wandb
from llmmed.signals import INTERRUPTED, Interrupted, StopRequest
from llmmed.training import Result, checkpoint, memory, prepare_backend, resolve_compile, train
from llmmed.training.executed import compare

logger = logging.getLogger(__name__)


def run(config: Config, folder: Path, *, started: float, stop: StopRequest | None = None) -> int:
    """Runs everything and writes the run folder of the design; whatever happens, `status.json` tells it.

    Args:
        config: Validated.
        folder: The run folder, existing. A checkpoint in it is continued if `train.resume` is set.
        started: `time.perf_counter()` when the process began.
        stop: Entered already, and watching for signals; without one, there is one for the run.

    Returns:
        The process's exit code: 0 finished, 1 failed, 130 interrupted.
    """
    console = consoles.output()
    errors = consoles.errors()
    with StopRequest() if stop is None else contextlib.nullcontext(stop) as request:
        try:
            run_folder.write_status(folder, "running")
            run_folder.write_environment(folder)
            _run(config, folder, console, started, request)
        except BaseException as error:  # noqa: BLE001 - whatever ends a run, its folder must say so
            request.settle()
            if request.raised and not isinstance(error, Interrupted):  # a compiler that died of the same signal, say
                error = Interrupted(f"{request.name} {request.moment}")
            return _end(error, folder, errors)
        run_folder.write_status(folder, "finished")
    return 0


def _end(error: BaseException, folder: Path, errors: Console) -> int:
    """Tells how a run ended early, on the terminal and in its folder. Returns the exit code."""
    if isinstance(error, Interrupted):
        _record(folder, "interrupted", str(error))
        errors.print(f"interrupted: {error}; go on with {run_folder.resuming(folder)}", markup=False)
        return INTERRUPTED
    if not isinstance(error, Exception):
        _record(folder, "failed", f"{type(error).__name__}: {error}")
        raise error
    told = reason = str(error)
    if isinstance(error, OSError):
        reason = in_words(error, folder)
        told = f"{reason}; what was written before is whole"
    elif not isinstance(error, UserError):
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        told = f"{reason} (traceback in {run_folder.shown(folder / 'train.log')})"
        logger.info("%s", "".join(traceback.format_exception(error)))  # below what the terminal shows
    _record(folder, "failed", reason)
    errors.print(f"error: {told}", markup=False)
    return 1


def _record(folder: Path, state: run_folder.State, reason: str) -> None:
    """Writes the status of a run that ends early; where not even that can be written, the terminal has it."""
    with contextlib.suppress(OSError):
        run_folder.write_status(folder, state, reason=reason)


def _run(config: Config, folder: Path, console: Console, started: float, stop: StopRequest) -> None:
    logger.info("configuration: %s", as_dict(config))
    prepare_backend(config)
    mode = resolve_compile(config)
    # What may be mistaken comes before what takes long.
    newest = _newest_checkpoint(config, folder, console)
    if newest is not None:
        stop.goes_on_from(checkpoint.step_of(newest))
        for change in continuation.changes(folder, config):
            console.print(f"goes on with another value: {change}", style="dim", markup=False)
    initial = init_from.find(config.model) if newest is None else None  # a resumed run has weights of its own
    with contextlib.ExitStack() as while_preparing:
        start = None
        if newest is None and config.kernels.policy == "auto":
            start = while_preparing.enter_context(processes_to_come(config.device))
        with collector.still():  # tensors without memory bring PyTorch's compiler with them
            workload = record_workload(config)
        plan = plan_of_checkpoint(newest, config, workload, mode) if newest is not None else None
        if plan is None:
            refuse(config, workload, mode)
        dataset = data.prepare(config, report=lambda message: console.print(message, style="dim", markup=False))
        if newest is not None:
            continuation.check_data(newest, dataset.fingerprint)
        print_header(config, dataset, mode, folder, console)

        if initial is not None:
            init_from.warn_of_other_tokenizer(initial, dataset.tokenizer_file)

        if plan is None:
            with telling_of_tuning(console) as report:
                plan = tune(config, workload, mode=mode, report=report, start=start)
    plan.write(folder / "kernels.json")
    mode = plan.mode
    logger.info("kernels %s: %s", "from the cache" if plan.cached else "chosen", plan.choice)
    print_kernel_table(plan, console)
    if config.train.dry_run:
        console.print(
            f"train.dry_run=true: nothing was trained. The plan is in {run_folder.shown(folder / 'kernels.json')}"
        )
        return

    def launched(names: set[str]) -> dict[str, Any]:
        confirmed = _confirm_execution(config, plan, names)
        confirmed.write(folder / "kernels.json")
        return confirmed.to_json()

    with memory.advised(config.train):
        model = build(config, plan, initial, goes_on=newest is not None)
    sink = open_wandb(config, folder, as_dict(config))
    if sink is not None:
        sink.log_plan(plan, folder / "kernels.json")
    status_word = "failed"
    summary: dict[str, Any] = plan.summary()
    try:
        result = train(
            config, model, dataset, folder, plan=plan.to_json(), mode=mode, sinks=[sink] if sink else [],
            console=console, started=started, resume=newest, stop=stop, launched=launched,
        )  # fmt: skip
        summary |= _summary(result, model)
        write_json(folder / "summary.json", finite(summary))
        if result.diverged:
            raise UserError(_divergence(result, config, folder))
        status_word = "finished"
    except Interrupted:
        status_word = "interrupted"
        raise
    finally:
        if sink is not None:
            sink.finish(summary, status_word)
    logger.info("summary: %s", summary)
    print_closing(summary, plan, folder, console)


def _newest_checkpoint(config: Config, folder: Path, console: Console) -> Path | None:
    """What a resumed run goes on from, if there is anything. Raises `UserError` if all of a named run are damaged."""
    if config.train.resume is None:
        return None
    kept = folder / "checkpoints"
    newest = checkpoint.latest(kept)
    if newest is None and checkpoint.all_of(kept) and config.train.resume != "auto":
        raise UserError(
            f"train.resume={config.train.resume}: no checkpoint in {run_folder.shown(kept)} is whole; start a new run"
        )
    if newest is None:
        told = f"no whole checkpoint in {run_folder.shown(folder)} yet; starts at step 1"
        console.print(told, style="dim", markup=False)
    return newest


def _confirm_execution(config: Config, plan: KernelPlan, launched: set[str]) -> KernelPlan:
    """The plan with what a trace of the step says of it. Raises `UserError` if something else ran."""
    if not launched:
        logger.warning("the profiler saw no kernels, so that nothing shows that the chosen ones ran")
        return plan
    return plan.model_copy(update={"executed": compare(plan.choice, called_ops(config, plan.choice), launched)})


def build(
    config: Config, plan: KernelPlan, initial: InitialWeights | None = None, *, goes_on: bool = False
) -> Transformer:
    """The model with the plan's kernels, on the run's device. Parameters are the same under every plan; those of a run
    that goes on are left to its checkpoint.

    Raises:
        UserError: Pins ask for implementations that do not go together.
    """
    try:
        kernels = load_kernels(plan.choice, plan.launches)
    except Unavailable as reason:
        raise UserError(str(reason)) from reason
    model = Transformer.for_training(config, kernels, config.device, initialized=initial is None and not goes_on)
    if initial is not None:
        model.load_state_dict(initial.load(config.model))
    return model


def _summary(result: Result, model: Transformer) -> dict[str, Any]:
    values: Mapping[str, float | None] = {
        "tokens_per_second": result.tokens_per_second,
        "mfu": result.mfu,
        "peak_memory_gib": result.peak_memory_gib,
        "final/train_loss": result.train_loss,
        "final/val_loss": result.val_loss,
        "final/val_accuracy": result.val_accuracy,
        "best/val_loss": result.best_val_loss,
        "best/step": result.best_step,
        "steps": result.steps,
        "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_time_seconds": result.training_time_seconds,
        "time_to_first_step_seconds": result.time_to_first_step_seconds,
        "skipped_steps": result.skipped_steps,
    }
    return dict(values)


def _divergence(result: Result, config: Config, folder: Path) -> str:
    clipping = ", or set train.grad_clip=1" if config.train.grad_clip == 0 else ""
    kept = (folder / "checkpoints" / checkpoint.folder_name(result.best_step)).exists()
    best = f"; the checkpoint of step {result.best_step} is the best" if kept else ""
    return (
        f"training diverged: the validation loss of step {result.steps} is not finite; lower "
        f"optimizer.lr={config.optimizer.lr:g}{clipping}{best}"
    )
