"""A run computes what a few lines of plain PyTorch compute, and a bug planted into training shows in what it spoils."""

from __future__ import annotations

import functools
import inspect
import pkgutil
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmmed.data import Batches, Dataset
from llmmed.files import read_metrics
from llmmed.signals import Interrupted
from tests.training.bugs import BUGS, SCALING_BUGS
from tests.training.tiny import SignalsAt, build, newest_checkpoint, pattern, relative_error, run_with, tiny_config

LR, GRAD_CLIP, WEIGHT_DECAY, MICRO_BATCHES = 0.01, 0.5, 2.0, 3
RATES = [LR * share for share in (0.5, 1.0, 0.8, 0.6, 0.4, 0.2)]  # of each step: warm-up, then down to the floor
LOGGED = {1: slice(0, 1), 3: slice(1, 3), 6: slice(3, 6)}  # log step -> the steps that its loss is the mean of
SETTINGS = (
    f"train.max_steps={len(RATES)}", "train.log_every=3", "train.micro_batch_size=2", "train.global_batch_tokens=96",
    f"train.grad_clip={GRAD_CLIP}", f"optimizer.lr={LR}", f"optimizer.weight_decay={WEIGHT_DECAY}",
    "optimizer.schedule=linear", "optimizer.warmup_steps=2", "optimizer.min_lr_ratio=0.2",
)  # fmt: skip
# Relative. Adam turns the sign of a tiny gradient into a whole step, so that roundings show in how parameters moved.
ROUNDING = {"fp32": 1e-4, "fp16": 0.2}


@pytest.mark.parametrize("precision", ROUNDING)
def test_a_run_computes_what_plain_pytorch_does(tmp_path: Path, precision: str) -> None:
    found = departures(tmp_path, precision)
    assert all(error < ROUNDING[precision] for error in found.values()), found


@pytest.mark.parametrize(
    ("precision", "bug"), [*(("fp32", bug) for bug in BUGS), *(("fp16", bug) for bug in SCALING_BUGS)]
)
def test_a_planted_bug_shows(precision: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference()  # before there is a bug
    function, before, after, quantity = (BUGS | SCALING_BUGS)[bug]
    plant(function, before, after, monkeypatch)
    found = departures(tmp_path, precision)
    assert found[quantity] > 1000 * ROUNDING[precision], found


def plant(where: str, before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces text within a function, for everyone who has imported it."""
    function = inspect.unwrap(pkgutil.resolve_name(where))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(before) == 1, f"{before!r} occurs {source.count(before)} times in {where}"
    defined: dict[str, Any] = {}
    exec(source.replace(before, after), function.__globals__, defined)
    monkeypatch.setattr(function, "__code__", inspect.unwrap(defined[function.__name__]).__code__)


def departures(folder: Path, precision: str) -> dict[str, float]:
    """Relative errors of a run that is stopped after step 3 and resumed: of each quantity, the largest."""
    config = tiny_config(*SETTINGS, f"train.precision={precision}")
    with pytest.raises(Interrupted, match="SIGTERM after step 3"):
        run_with(build(config), config, folder, dataset=noise(), sinks=[SignalsAt(3)])
    run_with(build(config), config, folder, dataset=noise(), resume=True)
    logged = [entry for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]
    assert [entry["step"] for entry in logged] == list(LOGGED)
    last, start, expected = newest_checkpoint(folder), build(config).state_dict(), reference()
    found = {key: [torch.tensor(entry[key]) for entry in logged] for key in ("loss", "grad_norm", "lr")}
    moved = [(last.model[name] - old, expected.model[name] - old) for name, old in start.items()]
    pairs = {
        "loss": zip(found["loss"], (expected.losses[steps].mean() for steps in LOGGED.values()), strict=True),
        "grad_norm": zip(found["grad_norm"], (expected.norms[step - 1] for step in LOGGED), strict=True),
        "lr": zip(found["lr"], (torch.tensor(RATES[step - 1]) for step in LOGGED), strict=True),
        "first moments": ((last.optimizer[f"{i:04d}.exp_avg"], mean) for i, mean in enumerate(expected.moments)),
        "matrices": (pair for pair in moved if pair[0].ndim == 2),
        "norms": (pair for pair in moved if pair[0].ndim == 1),
    }
    return {key: float(np.max([relative_error(*pair) for pair in each])) for key, each in pairs.items()}  # NaN stays


@dataclass(frozen=True)
class Reference:
    """What a run should have computed.

    Attributes:
        losses, norms: Of each step; the norms are those before clipping.
        model: Its state dict after the last step.
        moments: The first moment of each parameter, in their order, after the last step.
    """

    losses: Tensor
    norms: Tensor
    model: dict[str, Tensor]
    moments: list[Tensor]


@functools.cache
def reference() -> Reference:
    """The same run in plain PyTorch, in float32, each step in one batch."""
    config = tiny_config(*SETTINGS)
    model, train = build(config), config.train
    batches = Batches(noise().train, train.seq_len, train.micro_batch_size, config.seed, shuffle=True)
    matrices, norms = ([p for p in model.parameters() if p.ndim == ndim] for ndim in (2, 1))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, gradient_norms = [], []
    for step, rate in enumerate(RATES):
        batch = torch.cat([batches.get(MICRO_BATCHES * step + index) for index in range(MICRO_BATCHES)])
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradient_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    moments = [optimizer.state[parameter]["exp_avg"] for parameter in model.parameters()]
    return Reference(torch.stack(losses), torch.stack(gradient_norms), model.state_dict(), moments)


def noise() -> Dataset:
    """Random tokens: the gradients of any two batches differ."""
    return replace(pattern(), train=np.random.default_rng(0).integers(64, size=2560, dtype=np.uint16))
