"""Chosen = executed: the kernels that a traced training step launched, held against the plan.

A plan says what is to run; a compiler's cache or a backend's own choice may say otherwise, and nobody would notice.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping

import torch
from torch._C._autograd import DeviceType

from llmmed.errors import UserError
from llmmed.kernels.base import Unavailable
from llmmed.kernels.catalog import DEFAULT, get_implementation, implementation_names

NOT_CALLED = "not called under this plan"


def launched_kernels(run: Callable[[], object]) -> set[str]:
    """The names of the GPU kernels that `run` launches, replays of CUDA graphs included."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    return {event.name for event in profiler.events() if event.device_type == DeviceType.CUDA}


def prepare_tracing(device: torch.device) -> None:
    """Starts the profiler's library before a CUDA graph is captured: it does not see into graphs from before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True):
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)


def compare(choice: Mapping[str, str], called: Collection[str], launched: Collection[str]) -> dict[str, str]:
    """What the trace says of each op.

    Args:
        choice: The plan's, op -> implementation.
        called: The ops that a step under this plan calls.
        launched: Names of kernels, as the profiler gives them.

    Raises:
        UserError: an op's chosen implementation did not run, or another one did; it names the op.
    """
    found = {}
    for op, name in choice.items():
        if op not in called:
            found[op] = NOT_CALLED
            continue
        own, others = get_implementation(op, name).kernel_names, _others(op, name)
        # Kernels of PyTorch's backends do not carry the op's name: the default may take them as well.
        tell = {kernel for kernels in others.values() for kernel in kernels if kernel.startswith(f"{op}_")}
        foreign = {kernel for kernel in tell.difference(own) if _seen(kernel, launched)}
        if foreign:
            raise UserError(
                f"op '{op}': the plan says {name}, but the training step launched {', '.join(sorted(foreign))}; "
                f"please report this with kernels.json, and pin kernels.pin.{op}={name} or {DEFAULT} until then"
            )
        seen = [kernel for kernel in own if _seen(kernel, launched)]
        if own and not seen:
            raise UserError(
                f"op '{op}': the plan says {name}, but the training step launched none of {', '.join(own)}; "
                f"please report this with kernels.json, and use kernels.pin.{op}={DEFAULT} until then"
            )
        found[op] = f"seen: {', '.join(seen)}" if seen else "no kernel of another implementation of ours was seen"
        if same := [other for other, kernels in others.items() if seen and {*kernels} == {*own}]:
            found[op] += f", by which it cannot be told from {', '.join(same)}"
    return found


def _others(op: str, chosen: str) -> dict[str, tuple[str, ...]]:
    """The other implementations and their kernels."""
    others = {}
    for name in implementation_names(op):
        with contextlib.suppress(Unavailable):
            others[name] = get_implementation(op, name).kernel_names
    del others[chosen]
    return others


def _seen(kernel: str, launched: Collection[str]) -> bool:
    """Whether a name occurs, from the start of a word: `rms_norm_...` is no part of `add_rms_norm_...`."""
    pattern = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(kernel)}")
    return any(pattern.search(name) for name in launched)
