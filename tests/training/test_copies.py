"""Copies are kept where they are right and gain: by mode, accumulation, precision, and the length of a step."""

from __future__ import annotations

from typing import Any

import pytest

from llmmed.autotune.plan import Mode
from llmmed.autotune.step_clock import StepClock
from llmmed.kernels.catalog import default_choice
from llmmed.training import micro_step
from llmmed.training.copies import wanted
from llmmed.training.micro_step import build_micro_step
from tests.training.tiny import build, tiny_config

SMALL = ("model=small", "model.vocab_size=49152", "train.seq_len=512", "train.precision=bf16")
LONG = (*SMALL, "train.micro_batch_size=48")  # a step of 14.7 ms on an H100, whose update is issued in 4.9


@pytest.mark.parametrize(
    ("overrides", "mode", "expected"),
    [
        (LONG, "graphs", True),
        (LONG, "compiled", False),
        (LONG, "eager", False),
        ((*LONG, "train.global_batch_tokens=49152"), "graphs", False),  # two micro-batches
        ((*SMALL, "train.micro_batch_size=8"), "graphs", False),  # 2.5 ms: the device would wait for the host
        (("train.precision=bf16",), "graphs", False),  # tiny
    ],
)
def test_who_wants_copies(overrides: tuple[str, ...], mode: Mode, expected: bool) -> None:
    assert wanted(tiny_config(*overrides), mode) is expected


@pytest.fixture
def long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a tiny model took long, on a device that has CUDA graphs."""
    monkeypatch.setattr("llmmed.training.copies._PACE", 1.0)
    monkeypatch.setattr(micro_step, "GraphedMicroStep", lambda model, leaves, accumulates: (leaves, accumulates))


@pytest.mark.usefixtures("long_steps")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("accumulates", [False, True])
def test_a_run_keeps_them_and_its_graphs_write_their_gradients(precision: str, accumulates: bool) -> None:
    config = tiny_config(f"train.precision={precision}", f"train.global_batch_tokens={64 * (2 if accumulates else 1)}")
    model = build(config)
    built: Any = build_micro_step(model, config, "graphs")
    assert bool(model.copies) is (precision != "fp32" and not accumulates)
    assert built[1] is accumulates
    assert all(a is b for a, b in zip(built[0], model.leaves, strict=True))


@pytest.mark.usefixtures("long_steps")
@pytest.mark.parametrize(
    ("run", "tried", "expected"),
    [
        ("graphs", "graphs", True),
        ("graphs", "compiled", True),  # shares what is compiled
        ("graphs", "eager", False),
        ("compiled", "compiled", False),
    ],
)
def test_a_plan_is_tried_with_them_where_the_run_has_them(
    monkeypatch: pytest.MonkeyPatch, run: Mode, tried: Mode, expected: bool
) -> None:
    built: list[bool] = []
    monkeypatch.setattr("llmmed.autotune.step_clock.Subject", lambda model, *_, **__: built.append(bool(model.copies)))
    monkeypatch.setattr(StepClock, "_shared_pool", lambda self: None)
    StepClock(tiny_config("train.precision=bf16"), run)._build(default_choice(), 1, tried)
    assert built == [expected]
