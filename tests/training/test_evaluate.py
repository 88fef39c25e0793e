"""The evaluation: loss, perplexity and accuracy by hand, and never more logits at once than a chunk."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmmed.data import Batches
from llmmed.training.evaluate import Evaluator, count_right
from tests.training.tiny import build, pattern, tiny_config


def test_it_is_what_one_computes_by_hand() -> None:
    config = tiny_config("train.eval_batches=3")
    model, dataset = build(config), pattern()
    found = Evaluator(model, dataset, config.train).run()
    assert found is not None
    windows = Batches(dataset.validation, 16, 4, seed=0, shuffle=False)
    batch = torch.cat([windows.get(i) for i in range(3)])
    with torch.no_grad():
        logits, targets = model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
    assert found["val/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(found["val/loss"]))
    assert found["val/accuracy"] == (logits.argmax(-1) == targets).float().mean().item() > 0


@pytest.mark.parametrize("chunk", [1, 7 * 50, 10**9])
def test_accuracy_holds_no_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(33, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = (hidden @ head.T).argmax(-1)
    targets[::3] = (targets[::3] + 1) % 50
    targets[1::3] = -100
    largest, linear = 0, F.linear

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        result = linear(*arguments)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(F, "linear", watched)
    assert count_right(hidden, head, targets, chunk) == 11
    assert largest <= max(chunk, 50)
