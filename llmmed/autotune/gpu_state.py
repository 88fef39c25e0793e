"""What the tuning process asks of its GPU, and how it makes that ready."""

from __future__ import annotations

import contextlib

import torch

from llmmed.autotune.failures import one_line
from llmmed.training.memory import is_out

_ROOM = 64 * 2**30  # bytes of a GPU's memory


def has_room(device: torch.device) -> bool:
    """Whether a GPU has room for the processes that compile, each of which holds half a GiB, beside one that judges:
    where memory ran out, a right candidate would be rejected."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory >= _ROOM


def memory_of(device: torch.device) -> float | None:
    """What a plan may take of a GPU, in GiB: a little is left to the driver, the compiler and other programs."""
    if device.type != "cuda":
        return None
    return 0.94 * torch.cuda.get_device_properties(device).total_memory / 2**30


def free_memory(device: torch.device) -> float | None:
    """What nobody has taken of a GPU now, in GiB. Makes the GPU's context."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] / 2**30


def damage_of(device: torch.device) -> str | None:
    """What the GPU answers if it is in a state of error, which no later call can mend. Waits for what still runs."""
    if device.type != "cuda":
        return None
    try:
        torch.rand((), device=device)  # fails after the capture of a graph was broken off
        torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001 - of any kind: the driver's errors come as several
        return None if is_out(error) else one_line(error)
    return None


def prepare(device: str) -> None:
    """Loads the compiler, starts its processes and makes the GPU's context, which takes seconds, while others work."""
    with contextlib.suppress(Exception):  # what does not work here is told where it is needed
        torch.compile(lambda x: x + 1)(torch.zeros(16, device=device))
        torch._dynamo.reset()
