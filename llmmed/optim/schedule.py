"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from llmmed.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """The rate of step `step` (from 0): linear warm-up to `lr`, then as `schedule` says, all but `constant` down to
    `min_lr_ratio * lr`.

    Cosine as in SGDR (Loshchilov and Hutter 2017) without restarts. `wsd` is warm-up, stable, decay (Hu et al. 2024,
    arXiv:2404.06395): `lr` until the last `decay_ratio` of all steps, in which it falls linearly. The first step is not
    0, the last of the warm-up, which is one step at least, is `lr`, and the last of all is the floor, unless all are
    warm-up.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    decays_after = max(1, config.warmup_steps)
    if config.schedule == "wsd":
        decays_after = max(decays_after, max_steps - max(1, round(config.decay_ratio * max_steps)))
    progress = min(1.0, max(0.0, (step + 1 - decays_after) / max(1, max_steps - decays_after)))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
