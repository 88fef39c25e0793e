"""Which optimizer keeps what."""

from __future__ import annotations

import pytest

from llmmed.optim import build_optimizers, state_elements
from tests.training.tiny import build, tiny_config


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_state_that_is_told_is_the_state_that_there_is(name: str, tied: str) -> None:
    config = tiny_config(f"optimizer={name}", f"model.tie_embeddings={tied}")
    optimizers = build_optimizers(build(config), config.optimizer)
    states = [tensor for o in optimizers for state in o.state.values() for tensor in state.values()]
    kept = sum(tensor.numel() for tensor in states if tensor.ndim)  # without the counts of steps
    assert kept == state_elements(config.model, config.optimizer)
