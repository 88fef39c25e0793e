"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from llmmed.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """The rate of step `step` (from 0): linear warm-up to `lr`, then `schedule` down to `min_lr_ratio * lr`.

    Cosine as in SGDR (Loshchilov and Hutter 2017) without restarts. `wsd` is warm-up, stable, decay (Hu et al. 2024,
    arXiv:2404.06395): `lr` until the last `decay_ratio` of all steps, in which it falls linearly. The first step is not
    0 and the last is the floor, unless all are warm-up.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        stable_until = max(config.warmup_steps, max_steps - max(1, round(config.decay_ratio * max_steps)))
        progress = (step + 1 - stable_until) / max(1, max_steps - stable_until)
    elif step == max_steps - 1:
        progress = 1.0  # also where it is the only step after the warm-up
    else:
        progress = (step - config.warmup_steps) / max(1, max_steps - 1 - config.warmup_steps)
    progress = min(1.0, max(0.0, progress))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
