"""Trained with our Triton kernels, interpreted, a model gets the losses and weights that PyTorch's kernels give it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmmed.files import read_metrics
from llmmed.kernels.catalog import default_choice, implementation_names, load_kernels
from llmmed.model import Transformer
from tests.training.tiny import run_with, tiny_config

TRITON = {op: "triton" for op in default_choice() if "triton" in implementation_names(op)}


@pytest.mark.interpreter
def test_a_run_on_triton_kernels_equals_one_on_pytorch(tmp_path: Path) -> None:
    config = tiny_config("train.max_steps=4", "train.micro_batch_size=2")
    losses, weights = [], []
    for name, choice in (("pytorch", {}), ("triton", TRITON)):
        kernels = load_kernels(default_choice() | choice)
        model = Transformer(config.model, kernels, torch.float32, max_seq_len=16, seed=config.seed)
        run_with(model, config, tmp_path / name)
        losses.append([e["loss"] for e in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in e])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    start = Transformer(config.model, load_kernels(default_choice()), torch.float32, max_seq_len=16, seed=config.seed)
    moved = weights[0] - torch.cat([p.detach().flatten() for p in start.parameters()])
    assert (weights[1] - weights[0]).norm() < 0.02 * moved.norm()
