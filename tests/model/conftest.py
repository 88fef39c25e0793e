"""A model small enough for any test, and the default kernels."""

from __future__ import annotations

import pytest

from llmmed.config import ModelConfig
from llmmed.kernels.base import Kernels
from llmmed.kernels.catalog import default_choice, load_kernels


@pytest.fixture
def tiny() -> ModelConfig:
    """Grouped queries and a head of its own."""
    return ModelConfig(
        name="tiny",
        n_layers=2,
        d_model=64,
        n_heads=4,
        n_kv_heads=2,
        d_ff=96,
        vocab_size=101,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        init_from=None,
    )


@pytest.fixture
def kernels() -> Kernels:
    return load_kernels(default_choice())
