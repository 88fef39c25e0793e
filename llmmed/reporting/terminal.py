"""What a run prints before its kernel table and after its last step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmmed.autotune.child import Progress
from llmmed.autotune.hardware import describe_hardware
from llmmed.autotune.plan import KernelPlan, Mode
from llmmed.compose import accumulation_steps
from llmmed.config import Config
from llmmed.data import Dataset
from llmmed.kernels.catalog import DEFAULT
from llmmed.model import parameter_count
from llmmed.run_folder import shown

_SECONDS_BETWEEN_LINES = 10  # about tuning, where there is no terminal


def print_header(config: Config, dataset: Dataset, mode: Mode, folder: Path, console: Console) -> None:
    """Device, versions, model, data and batch, one line each."""
    model, step = config.model, config.train
    hardware = describe_hardware(config.device)
    versions = [f"torch {hardware.torch}", f"triton {hardware.triton}" if hardware.triton else "no triton"]
    if hardware.driver:
        versions.append(f"driver {hardware.driver}")
    accumulation = accumulation_steps(step)
    batch = f"{step.micro_batch_size} x {step.seq_len} tokens"
    if accumulation > 1:
        batch += f" x {accumulation} micro-batches"
    text = f"{_count(len(dataset.train))} training, {_count(len(dataset.validation))} validation tokens"
    if dataset.train_documents:
        text = f"{dataset.train_documents + dataset.validation_documents:,} documents, {text}"
    epochs = step.max_steps * step.global_batch_tokens / len(dataset.train)
    rows = {
        "device": f"{hardware.device}, {', '.join(versions)}",
        "model": f"{model.name}: {model.n_layers} x {model.d_model}, {_count(parameter_count(model))} parameters",
        "data": f"{dataset.name}: {text}",
        "step": f"{batch} = {_count(step.global_batch_tokens)} tokens, {step.precision}, {mode}",
        "run": f"{step.max_steps:,} steps = {epochs:.2g} epochs, {shown(folder)}",
    }
    console.print(_pairs(rows))


@contextlib.contextmanager
def telling_of_tuning(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Yields what takes each progress: one line that changes on a terminal, elsewhere a line every few seconds."""
    if console.is_terminal:
        with console.status("tuning") as status:
            yield lambda progress: status.update(str(progress))
        return
    told = -math.inf

    def tell(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() >= told + _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            console.print(str(progress), style="dim", markup=False)

    yield tell


def print_closing(summary: Mapping[str, Any], plan: KernelPlan, folder: Path, console: Console) -> None:
    """What came out, and where everything is."""
    speed = "not timed, too few steps"
    if summary["tokens_per_second"] is not None:
        speed = f"{summary['tokens_per_second']:,.0f} tokens/s"
    if summary["mfu"] is not None:
        speed += f", MFU {summary['mfu']:.1%}"
    if summary["peak_memory_gib"] is not None:
        speed += f", peak memory {summary['peak_memory_gib']:.2f} GiB"
    seconds, first = summary["training_time_seconds"], summary["time_to_first_step_seconds"]
    rows = {
        "loss": f"training {summary['final/train_loss']:.4f}, validation {_validation(summary)}",
        "speed": speed,
        "time": f"{seconds:.1f} s of training; first step {first:.1f} s after the start",
        "kernels": kernels_in_words(plan.choice),
        "files": f"{shown(folder)}/",
    }
    console.print(_pairs(rows))


def kernels_in_words(choice: Mapping[str, str]) -> str:
    """`triton for add_rms_norm, rotary; pytorch for the rest`."""
    others = [name for name in dict.fromkeys(choice.values()) if name != DEFAULT]
    if not others:
        return f"{DEFAULT} for every op"
    told = [f"{name} for {', '.join(op for op, n in choice.items() if n == name)}" for name in others]
    return "; ".join(told + ([f"{DEFAULT} for the rest"] if DEFAULT in choice.values() else []))


def _validation(summary: Mapping[str, Any]) -> str:
    last, best, step = summary["final/val_loss"], summary["best/val_loss"], summary["best/step"]
    unit = f"{last:.4f} nats a token"
    return unit if step in (0, summary["steps"]) else f"{unit} (best {best:.4f}, step {step:,})"


def _pairs(rows: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _count(number: int) -> str:
    """`27.4 M`: three significant figures, so that a line is read at a glance."""
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
