"""Out of memory in training: how it is recognised, on whichever device, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmmed.config import TrainConfig
from llmmed.errors import UserError
from llmmed.micro_batch import divisors

# What PyTorch raises as a plain RuntimeError: libraries that cannot get a workspace, graphs that are captured, the CPU.
_SAID = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "DefaultCPUAllocator")


def is_out(error: Exception) -> bool:
    """Whether an exception means that there is not enough memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(said in str(error) for said in _SAID)


@contextmanager
def advised(train: TrainConfig) -> Iterator[None]:
    """A context from which out of memory comes as `UserError` with what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out(error):
            raise UserError(advice(train)) from error
        raise


def advice(train: TrainConfig) -> str:
    """The next smaller micro-batch that makes up the same step, or else another way."""
    smaller = [size for size in divisors(train) if size < train.micro_batch_size]
    said = f"out of memory in training with train.micro_batch_size={train.micro_batch_size}; try "
    if smaller:
        step = f"train.global_batch_tokens={train.global_batch_tokens}"
        said += f"train.micro_batch_size={smaller[-1]} {step}, or auto in place of {smaller[-1]} for what fits a GPU"
    if train.activation_checkpointing == "none":
        said += f"{', or ' if smaller else ''}train.activation_checkpointing=block"
    elif not smaller:
        said += "a shorter train.seq_len or a smaller model"
    return said
