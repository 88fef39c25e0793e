"""On a GPU every mode of execution trains like eager, whatever the precision and the number of accumulated batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer, compute_dtype
from llmmed.training.execution import resolve_compile
from llmmed.training.loop import train
from tests.training.tiny import pattern, tiny_config

pytestmark = pytest.mark.gpu

PARTS = dict.fromkeys(("rms_norm", "rotary", "attention", "linear_cross_entropy"), "triton")
TRITON = {**PARTS, "rotary_attention": "triton", "swiglu_mlp": "triton"}  # in the place of what they are made of


def weights(folder: Path, mode: str, precision: str, accumulated: int, kernels: dict[str, str]) -> list[torch.Tensor]:
    folder.mkdir()
    config = tiny_config(
        "device=cuda",
        f"train.compile={mode}",
        f"train.precision={precision}",
        f"train.micro_batch_size={8 // accumulated}",
        "train.global_batch_tokens=128",
        "train.max_steps=6",
        "optimizer.lr=1e-3",
    )
    model = Transformer(
        config.model, load_kernels(default_choice() | kernels), compute_dtype(precision), max_seq_len=16, device="cuda"
    )
    console = Console(file=(folder / "console.txt").open("w"))
    train(
        config,
        model,
        pattern(),
        folder,
        plan={},
        mode=resolve_compile(config),
        sinks=[],
        console=console,
        started=0.0,
        resume=None,
    )
    return [parameter.detach().float() for parameter in model.parameters()]


@pytest.mark.parametrize("kernels", [{}, PARTS, TRITON], ids=["pytorch", "parts", "triton"])
@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_mode_trains_like_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, accumulated: int, kernels: dict[str, str]
) -> None:
    monkeypatch.setattr("llmmed.training.copies._PACE", 1.0)  # as if a step took long: with copies where a run has them
    torch.compiler.reset()
    eager = weights(tmp_path / "eager", "eager", precision, accumulated, kernels)
    start = weights_at_start()
    for mode in ("compiled", "graphs"):
        found = weights(tmp_path / mode, mode, precision, accumulated, kernels)
        moved = sum(((a - b).square().sum() for a, b in zip(eager, start, strict=True)), torch.zeros((), device="cuda"))
        apart = sum(((a - b).square().sum() for a, b in zip(eager, found, strict=True)), torch.zeros((), device="cuda"))
        assert moved > 0
        # Adam turns the sign of a tiny gradient into a whole step, so roundings show; a wrong gradient gives 1 or more.
        assert (apart / moved).sqrt() < 0.1, mode


def weights_at_start() -> list[torch.Tensor]:
    config = tiny_config("device=cuda")
    model = Transformer(config.model, load_kernels(default_choice()), torch.float32, max_seq_len=16, device="cuda")
    return [parameter.detach().float() for parameter in model.parameters()]
