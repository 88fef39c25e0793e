"""A run small enough for any test: a tiny model on a pattern that it can learn by heart."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from torch import Tensor

from llmmed.compose import compose
from llmmed.config import Config
from llmmed.data import Dataset
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer
from llmmed.training import checkpoint
from llmmed.training.execution import resolve_compile
from llmmed.training.loop import train
from llmmed.training.metrics import Sink
from llmmed.training.result import Result

TINY = [
    "experiment=smoke",
    "data=synthetic",
    "device=cpu",
    "model.vocab_size=64",
    "train.seq_len=16",
    "train.micro_batch_size=4",
    "train.max_steps=12",
    "train.eval_every=0",
    "train.checkpoint_every=0",
    "train.log_every=1",
    "optimizer.warmup_steps=2",
]


@functools.cache
def tiny_config(*overrides: str) -> Config:
    return compose([*TINY, *overrides])


def newest_checkpoint(folder: Path) -> checkpoint.Checkpoint:
    """As a run that goes on finds and loads it."""
    path = checkpoint.latest(folder / "checkpoints")
    assert path is not None
    return checkpoint.load(path)


def pattern() -> Dataset:
    """Counting up, again and again: the next token is certain."""
    tokens = np.tile(np.arange(64, dtype=np.uint16), 40)
    return Dataset(
        name="pattern",
        train=tokens,
        validation=tokens[:400],
        tokenizer_file=None,
        end_token=0,
        bytes_per_token=2.0,
        train_documents=1,
        validation_documents=1,
        fingerprint="pattern",
    )


def build(config: Config) -> Transformer:
    return Transformer.for_training(config, load_kernels(default_choice()), "cpu")


class SignalsAt:
    """A sink that sends a signal while a step is logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step == self.step and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, summary: Mapping[str, object], status: str) -> None:
        pass


def run(
    config: Config, folder: Path, *, resume: bool = False, sinks: Sequence[Sink] = ()
) -> tuple[Transformer, Result]:
    model = build(config)
    return model, run_with(model, config, folder, resume=resume, sinks=sinks)


def run_with(
    model: Transformer,
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    sinks: Sequence[Sink] = (),
    dataset: Dataset | None = None,
) -> Result:
    folder.mkdir(exist_ok=True, parents=True)
    quiet = Console(file=(folder / "console.txt").open("a"))
    return train(
        config,
        model,
        dataset or pattern(),
        folder,
        plan={},
        mode=resolve_compile(config),
        sinks=sinks,
        console=quiet,
        started=0.0,
        resume=checkpoint.latest(folder / "checkpoints") if resume else None,
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """By the norms of all elements together."""
    return float((found - expected).norm() / expected.norm())
