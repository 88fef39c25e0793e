"""What a run comes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What a finished run reports. Losses in nats a token, NaN where there is none; memory as the allocator's peak."""

    steps: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    best_val_loss: float
    best_step: int
    tokens_per_second: float | None  # of the median interval between log steps; None where there was none
    mfu: float | None
    peak_memory_gib: float | None
    training_time_seconds: float
    time_to_first_step_seconds: float
    skipped_steps: int
    diverged: bool  # the last validation loss is not finite
