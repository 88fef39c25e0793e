"""Optimizers: AdamW over two groups, batched Muon, and the learning-rate schedule."""

from llmmed.optim.adamw import build_adamw
from llmmed.optim.schedule import learning_rate

__all__ = ["build_adamw", "learning_rate"]
