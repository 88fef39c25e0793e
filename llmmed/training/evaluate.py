"""The validation loss over a fixed set: the same windows at every evaluation and in every run of the same data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmmed.config import TrainConfig
from llmmed.data import Batches, Dataset


class Evaluator:
    """Args:
    loss: `(tokens, targets) -> mean loss`, as the training calls it: [batch, seq] int64 each.
    dataset: Its validation tokens.
    train: `eval_batches` windows of micro-batch size at most; fewer where the validation set is smaller.
    """

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor], dataset: Dataset, train: TrainConfig, device: torch.device
    ) -> None:
        self._loss, self._device = loss, device
        self._bytes_per_token = dataset.bytes_per_token
        # A set shorter than a batch fills it by starting again: the shapes stay those of the training.
        windows = Batches(
            dataset.validation, train.seq_len, train.micro_batch_size, seed=0, shuffle=False, name="the validation part"
        )
        self._batches = [windows.get(i) for i in range(min(train.eval_batches, windows.batches_per_epoch))]

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """`val/loss` in nats a token, `val/perplexity`, and `val/bits_per_byte` where the text is known."""
        total = torch.zeros(
            (), dtype=torch.float64 if self._device.type == "cpu" else torch.float32, device=self._device
        )
        for batch in self._batches:
            moved = batch.to(self._device, non_blocking=True)
            total += self._loss(moved[:, :-1].contiguous(), moved[:, 1:].contiguous())
        loss = float(total) / len(self._batches)
        found = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
        if self._bytes_per_token:
            found["val/bits_per_byte"] = loss / math.log(2) / self._bytes_per_token
        return found
