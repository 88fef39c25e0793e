"""The validation over a fixed set: the same windows at every evaluation, and in every run of the same data and length
of sequence, whatever its micro-batch is."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

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
    train: `eval_tokens` in windows of `seq_len`, drawn from the whole validation part by a seed that never changes;
        as many as there are where there are fewer. Of a mixture they are drawn by its weights, so that those of a small
        source may count several times. The micro-batch decides only how many are computed at once.
    """

    def __init__(self, model: Transformer, dataset: Dataset, train: TrainConfig) -> None:
        self._model, self._device = model, model.token_embedding.device
        self._bytes_per_token = dataset.bytes_per_token
        size = train.micro_batch_size
        windows = Batches(dataset.validation, train.seq_len, size, seed=0, shuffle=True, name="the validation part")
        self._count = min(max(1, train.eval_tokens // train.seq_len), windows.n_windows)
        self._batches = [windows.get(i) for i in range(math.ceil(self._count / size))]
        self._targets = [batch[:, 1:].clone() for batch in self._batches]
        # Shapes stay those of the training: what the last batch has too many does not count.
        self._targets[-1][self._count - (len(self._batches) - 1) * size :] = IGNORE_INDEX

    @torch.no_grad()
    def run(self, stopping: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """`val/loss` in nats a token, `val/perplexity`, `val/accuracy` as the share of tokens that the model finds the
        likeliest, and `val/bits_per_byte` where the text is known. None if `stopping` says so between two batches."""
        on_cpu = self._device.type == "cpu"
        total = torch.zeros((), dtype=torch.float64 if on_cpu else torch.float32, device=self._device)
        right = torch.zeros((), dtype=torch.int64, device=self._device)
        for batch, its_targets in zip(self._batches, self._targets, strict=True):
            if stopping():
                return None
            tokens = batch[:, :-1].contiguous().to(self._device, non_blocking=True)
            targets = its_targets.to(self._device, non_blocking=True)
            hidden_states = self._model.hidden_states(tokens)
            counted = int((its_targets[:, 0] != IGNORE_INDEX).sum())
            total += self._model.loss(hidden_states, targets) * (counted / self._count)
            right += count_right(hidden_states.flatten(0, 1), self._model.head, targets.flatten())
        loss_value = float(total)
        found = {
            "val/loss": loss_value,
            "val/perplexity": math.exp(min(loss_value, 700.0)),
            "val/accuracy": int(right) / (self._count * self._targets[0].shape[1]),
        }
        if self._bytes_per_token:
            found["val/bits_per_byte"] = loss_value / math.log(2) / self._bytes_per_token
        return found


@dataclass
class Best:
    """The best validation loss, the step it was seen at, and the evaluations since."""

    step: int = 0
    loss: float = sys.float_info.max  # infinity is no JSON
    waited: int = 0

    def see(self, step: int, loss: float) -> bool:
        if loss < self.loss:
            self.step, self.loss, self.waited = step, loss, 0
            return True
        self.waited += 1
        return False


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
