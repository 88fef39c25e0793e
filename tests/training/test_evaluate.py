"""The evaluation: loss, perplexity and accuracy by hand, and never more logits at once than a chunk."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmmed.data import Batches, Dataset
from llmmed.training.evaluate import Evaluator, count_right
from tests.training.tiny import build, pattern, tiny_config


def test_it_is_what_one_computes_by_hand() -> None:
    config = tiny_config("train.eval_tokens=192")
    model, dataset = build(config), pattern()
    found = Evaluator(model, dataset, config.train).run()
    assert found is not None
    batch = Batches(dataset.validation, 16, 12, seed=0, shuffle=True).get(0)
    with torch.no_grad():
        logits, targets = model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
    assert found["val/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(found["val/loss"]))
    assert found["val/accuracy"] == (logits.argmax(-1) == targets).sum().item() / 192 > 0


@pytest.mark.parametrize("tokens", [11 * 16, 10**6])  # eleven windows; all 24 of them
def test_the_windows_do_not_depend_on_the_micro_batch(tokens: int) -> None:
    model, dataset = build(tiny_config()), varied()
    found = {}
    for size in (1, 4, 5, 48):
        config = tiny_config(
            f"train.eval_tokens={tokens}", f"train.micro_batch_size={size}", "train.global_batch_tokens=3840"
        )
        found[size] = Evaluator(model, dataset, config.train).run()
    assert found[4]["val/loss"] != pytest.approx(math.log(64), rel=1e-4), "an untrained model would show nothing"
    for size in found:
        assert found[size] == pytest.approx(found[1], rel=1e-6), size


def test_the_windows_are_drawn_from_the_whole_validation_part() -> None:
    config = tiny_config("train.eval_tokens=128")  # eight of 24 windows
    dataset = varied()
    model, seen = build(config), []
    model.hidden_states = lambda tokens, run=model.hidden_states: (seen.append(tokens), run(tokens))[1]
    Evaluator(model, dataset, config.train).run()
    starts = [int(np.flatnonzero((windows_of(dataset.validation) == row.numpy()).all(1))[0]) for row in torch.cat(seen)]
    assert len(set(starts)) == 8
    assert max(starts) > 16
    assert min(starts) < 8


def varied() -> Dataset:
    """Windows that differ, so that another choice of them has another loss."""
    return replace(pattern(), validation=np.random.default_rng(0).integers(0, 64, 24 * 16 + 1).astype(np.uint16))


def windows_of(tokens: np.ndarray) -> np.ndarray:
    return tokens[: len(tokens) // 16 * 16].reshape(-1, 16)


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
