"""Optimizers: AdamW over two groups, batched Muon, and the learning-rate schedule."""

from llmmed.optim.build import build_muon, build_optimizers, state_elements
from llmmed.optim.schedule import learning_rate

__all__ = ["build_muon", "build_optimizers", "learning_rate", "state_elements"]
