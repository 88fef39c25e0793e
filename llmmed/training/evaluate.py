"""The validation over a fixed set: the same windows at every evaluation and in every run of the same data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmmed.config import TrainConfig
from llmmed.data import Batches, Dataset
from llmmed.model import IGNORE_INDEX, Transformer

_CHUNK = 2**24  # logits at once: all of a batch would be gigabytes


class Evaluator:
    """Args:
    model: On its device, compiled or not. Its kernels compute the loss, as in the training.
    dataset: Its validation tokens.
    train: `eval_batches` windows of micro-batch size at most; fewer where the validation set is smaller.
    """

    def __init__(self, model: Transformer, dataset: Dataset, train: TrainConfig) -> None:
        self._model, self._device = model, model.token_embedding.device
        self._bytes_per_token = dataset.bytes_per_token
        # A set shorter than a batch fills it by starting again: the shapes stay those of the training.
        windows = Batches(
            dataset.validation, train.seq_len, train.micro_batch_size, seed=0, shuffle=False, name="the validation part"
        )
        self._batches = [windows.get(i) for i in range(min(train.eval_batches, windows.batches_per_epoch))]

    @torch.no_grad()
    def run(self, stopping: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """`val/loss` in nats a token, `val/perplexity`, `val/accuracy` as the share of tokens that the model finds the
        likeliest, and `val/bits_per_byte` where the text is known. None if `stopping` says so between two batches."""
        on_cpu = self._device.type == "cpu"
        total = torch.zeros((), dtype=torch.float64 if on_cpu else torch.float32, device=self._device)
        right = torch.zeros((), dtype=torch.int64, device=self._device)
        for batch in self._batches:
            if stopping():
                return None
            moved = batch.to(self._device, non_blocking=True)
            targets = moved[:, 1:].contiguous()
            hidden_states = self._model.hidden_states(moved[:, :-1].contiguous())
            total += self._model.loss(hidden_states, targets)
            right += count_right(hidden_states.flatten(0, 1), self._model.head, targets.flatten())
        loss_value = float(total) / len(self._batches)
        found = {
            "val/loss": loss_value,
            "val/perplexity": math.exp(min(loss_value, 700.0)),
            "val/accuracy": int(right) / sum(batch[:, 1:].numel() for batch in self._batches),
        }
        if self._bytes_per_token:
            found["val/bits_per_byte"] = loss_value / math.log(2) / self._bytes_per_token
        return found


def count_right(hidden_states: Tensor, head: Tensor, targets: Tensor, chunk: int = _CHUNK) -> Tensor:
    """How many targets are the likeliest token, a 0-d int64 tensor. Never holds more than `chunk` logits.

    Args:
        hidden_states: [rows, d_model] in the compute dtype, in which the logits are compared.
        head: [vocab, d_model].
        targets: [rows] int64; `IGNORE_INDEX` is never right.
        chunk: Logits at once, but one row at least.
    """
    rows, weight = max(1, chunk // head.shape[0]), head.to(hidden_states.dtype)
    right = torch.zeros((), dtype=torch.int64, device=targets.device)
    for some, wanted in zip(hidden_states.split(rows), targets.split(rows), strict=True):
        right += ((F.linear(some, weight).argmax(-1) == wanted) & (wanted != IGNORE_INDEX)).sum()
    return right
