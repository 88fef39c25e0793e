"""AdamW (Loshchilov and Hutter 2019), fused where PyTorch can, with weight decay for matrices only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llmmed.config import OptimizerConfig


def build_adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Norm weights are not decayed: they are scales, and zero is no natural value for them.

    The learning rate is a 0-d tensor, so that a schedule neither recompiles nor synchronises. The moments exist from
    the start: CUDA graphs are captured before the first step, and the memory measured then should be all of the run's.
    """
    given = list(parameters)
    lr = torch.tensor(config.lr, dtype=torch.float32, device=given[0].device)
    groups = decay_groups(given, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)
    for parameter in given:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """An optimizer's parameter groups: matrices, which decay, and everything else, which does not."""
    given = list(parameters)
    return [
        {"params": [p for p in given if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in given if p.ndim < 2], "weight_decay": 0.0},
    ]
