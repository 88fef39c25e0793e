"""`train.micro_batch_size=auto`: the largest micro-batch that fits, found once and stored as a number.

The configuration itself knows numbers only: `cli` replaces `auto` here, before anything else looks at it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from llmmed import compose, continuation
from llmmed.config import Config, TrainConfig
from llmmed.errors import UserError
from llmmed.processes import started_process

TOO_LARGE = 3  # exit code of the process that tries one size


def resolve(composed: DictConfig, overrides: Sequence[str], folder: Path, report: Callable[[str], None]) -> DictConfig:
    """The composed configuration with a number in place of `auto`; as it is where there is a number already.

    A resumed run keeps the number that it began with. On a GPU, sizes are tried in processes of their own; on a CPU it
    is the one that the YAML states for a CPU, or the next below it that divides the step.

    Args:
        composed: Without Hydra's own part.
        overrides: What the user wrote.
        folder: The run folder.
        report: Takes one line.

    Raises:
        UserError: not even one sequence fits; or `train.global_batch_tokens` is not stated.
    """
    if not compose.asks_for_auto_batch(composed):
        return composed
    config = compose.validate(composed, overrides, typed=())  # refused before if it had to be
    sizes = divisors(config.train)
    size = _of_checkpoint(folder) if config.train.resume is not None else None
    if size is not None:
        report(f"train.micro_batch_size=auto: {size}, as this run began")
    elif config.device == "cpu":
        stated = _stated(overrides)
        size = max(n for n in sizes if n <= stated)
        report(f"train.micro_batch_size=auto: {size}; on a CPU it is not searched for but taken from the configuration")
    else:
        started = time.perf_counter()
        size = largest_that_fits(sizes, lambda n: _fits(config, n))
        if size is None:
            raise UserError(
                f"train.micro_batch_size=auto: not even one sequence of train.seq_len={config.train.seq_len} fits into "
                f"the GPU's memory; try train.activation_checkpointing=block, a shorter train.seq_len, a smaller model"
            )
        report(f"train.micro_batch_size=auto: {size} fits, found in {time.perf_counter() - started:.0f} s")
    return compose.with_micro_batch(composed, size)


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of some ascending sizes for which `fits` holds, or None. What it returns has been tried.

    The largest of all comes first, since it often fits; then halving, for if a size fits, so does every smaller one.
    """
    low, high = -1, len(sizes)  # the largest index known to fit, the smallest known not to
    middle = high - 1
    while low + 1 < high:
        if fits(sizes[middle]):
            low = middle
        else:
            high = middle
        middle = (low + high) // 2
    return sizes[low] if low >= 0 else None


def divisors(train: TrainConfig) -> list[int]:
    """The micro-batch sizes that make up the global batch, ascending."""
    sequences = train.global_batch_tokens // train.seq_len
    return [n for n in range(1, sequences + 1) if sequences % n == 0]


def _of_checkpoint(folder: Path) -> int | None:
    stored = continuation.stored_config(folder)
    return None if stored is None else int(stored["train"]["micro_batch_size"])


def _stated(overrides: Sequence[str]) -> int:
    """What the YAML says without the user's `auto`, or 1 where that is in the YAML too."""
    others = [override for override in overrides if not override.startswith("train.micro_batch_size=")]
    stated = compose.compose_yaml(others).train.micro_batch_size
    return stated if isinstance(stated, int) else 1


def _fits(config: Config, size: int) -> bool:
    """Whether two steps with micro-batches of that size run on the GPU. Raises `UserError` if that cannot be told."""
    tried = replace(config, train=replace(config.train, micro_batch_size=size))
    with tempfile.TemporaryDirectory(prefix="llmmed-micro-batch-") as folder:
        job, log = Path(folder) / "config.json", Path(folder) / "log"
        job.write_text(json.dumps(compose.as_dict(tried)), encoding="utf-8")
        with started_process("llmmed.training.fits", [str(job)], log) as process:
            code = process.wait()
        said = log.read_text(encoding="utf-8", errors="replace").strip()
    if code not in (0, TOO_LARGE):
        reason = said.splitlines()[-1:] or [f"exit code {code}"]
        raise UserError(f"train.micro_batch_size=auto: {size} could not be tried: {reason[0][:200]}; state a number")
    return code == 0
