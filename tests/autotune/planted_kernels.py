"""Implementations of `rms_norm` that misbehave, each in its own way; the tests install this file as a package."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from llmmed.kernels.base import Implementation, Unavailable
from llmmed.kernels.tunable import Tunable


def right(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return right(x, weight, eps) * 1.02


def wrong_if_one_short(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Of a multiple of four, as no case of the op is."""
    return wrong(x, weight, eps) if x.shape[-1] % 4 == 3 else right(x, weight, eps)


def slow(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    time.sleep(0.005)
    return right(x, weight, eps)


def no_gradient(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return right(x, weight, eps).detach()


def mutates(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = right(x, weight, eps)
    x.data.mul_(2)  # autograd does not notice
    return out


def raises(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    raise ValueError("no such tile")


def hungry(x: Tensor, weight: Tensor, eps: float) -> NoReturn:
    raise MemoryError


def hangs(x: Tensor, weight: Tensor, eps: float) -> NoReturn:
    while True:
        time.sleep(1)


def dies(x: Tensor, weight: Tensor, eps: float) -> NoReturn:
    _die()


def dies_later(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """When its verdict is known and another has its turn."""
    _awaits_its_verdict()
    return right(x, weight, eps)


@functools.cache
def _awaits_its_verdict() -> None:
    answer = Path(sys.argv[1])  # of the process that verifies

    def wait() -> None:
        while not answer.exists():
            time.sleep(0.0005)
        time.sleep(0.5)
        _die()

    threading.Thread(target=wait, daemon=True).start()


@functools.cache
def _starts() -> None:
    time.sleep(1.5)


def slow_to_start(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _starts()
    return right(x, weight, eps)


def leaves(x: Tensor, weight: Tensor, eps: float) -> NoReturn:
    raise SystemExit("enough of this")


def hangs_when_measured(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hangs(x, weight, eps) if _measured() else right(x, weight, eps)


def dies_when_measured(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return dies(x, weight, eps) if _measured() else right(x, weight, eps)


def raises_when_measured(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return raises(x, weight, eps) if _measured() else right(x, weight, eps)


def slow_in_the_step(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if _in_the_step():
        time.sleep(0.02)
    return fast(x, weight, eps)


def wrong_in_the_step(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return fast(x, weight, eps) * (1.2 if _in_the_step() else 1.0)


def dies_in_the_step(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return dies(x, weight, eps) if _in_the_step() else fast(x, weight, eps)


def fast(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


class Launch(NamedTuple):
    milliseconds: int
    right: int = 1
    alive: int = 1


def _at(launch: Launch, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not launch.alive:
        _die()
    time.sleep(1e-3 * launch.milliseconds)
    return right(x, weight, eps) * (1.0 if launch.right else 1.02)


def tuned(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _at(_TUNED(x.device, width=x.shape[-1]), x, weight, eps)


def tuned_to_death(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _at(_TUNED_TO_DEATH(x.device, width=x.shape[-1]), x, weight, eps)


def tuned_where_it_runs(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.is_meta:
        raise NotImplementedError("no such operator for meta tensors")
    return _at(_TUNED_WHERE_IT_RUNS(x.device, width=x.shape[-1]), x, weight, eps)


def _tunable(*alternatives: Launch) -> Tunable[Launch]:
    return Tunable("planted", lambda device, width: Launch(40), lambda device, width: alternatives)


_TUNED = _tunable(Launch(5), Launch(60), Launch(0, right=0))
_TUNED_TO_DEATH = _tunable(Launch(5), Launch(0, alive=0))
_TUNED_WHERE_IT_RUNS = _tunable(Launch(5))


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("still alive")


def _measured() -> bool:
    return any(frame.filename.endswith("measure.py") for frame in inspect.stack(context=0))


def _in_the_step() -> bool:
    return any(frame.filename.endswith("step_clock.py") for frame in inspect.stack(context=0))


def _unavailable() -> NoReturn:
    raise Unavailable("the licence of this kernel has run out")


def _breaks() -> NoReturn:
    raise OSError("libkernel.so: cannot open shared object file")


def _implementation(name: str, function: Any) -> Implementation:
    return Implementation(name, load=lambda: function)


RIGHT = _implementation("right", right)
WRONG = _implementation("wrong", wrong)
WRONG_IF_ONE_SHORT = _implementation("wrong_if_one_short", wrong_if_one_short)
SLOW = _implementation("slow", slow)
NO_GRADIENT = _implementation("no_gradient", no_gradient)
MUTATES = _implementation("mutates", mutates)
RAISES = _implementation("raises", raises)
HUNGRY = _implementation("hungry", hungry)
HANGS = _implementation("hangs", hangs)
DIES = _implementation("dies", dies)
DIES_LATER = _implementation("dies_later", dies_later)
SLOW_TO_START = _implementation("slow_to_start", slow_to_start)
LEAVES = _implementation("leaves", leaves)
HANGS_WHEN_MEASURED = _implementation("hangs_when_measured", hangs_when_measured)
DIES_WHEN_MEASURED = _implementation("dies_when_measured", dies_when_measured)
RAISES_WHEN_MEASURED = _implementation("raises_when_measured", raises_when_measured)
SLOW_IN_THE_STEP = _implementation("slow_in_the_step", slow_in_the_step)
WRONG_IN_THE_STEP = _implementation("wrong_in_the_step", wrong_in_the_step)
DIES_IN_THE_STEP = _implementation("dies_in_the_step", dies_in_the_step)
TUNED = Implementation("tuned", load=lambda: tuned, tunable=(_TUNED,))
TUNED_TO_DEATH = Implementation("tuned_to_death", load=lambda: tuned_to_death, tunable=(_TUNED_TO_DEATH,))
TUNED_WHERE_IT_RUNS = Implementation(
    "tuned_where_it_runs", load=lambda: tuned_where_it_runs, tunable=(_TUNED_WHERE_IT_RUNS,)
)
UNAVAILABLE = Implementation("unavailable", load=_unavailable)
BREAKS = Implementation("breaks", load=_breaks)
GPU_ONLY = Implementation("gpu_only", load=lambda: right, devices=("cuda",))
HALF_ONLY = Implementation("half_only", load=lambda: right, dtypes=(torch.bfloat16,))
FORWARD_ONLY = Implementation("forward_only", load=lambda: right, backward=False)
NOISY = Implementation("noisy", load=lambda: right, deterministic=False)
EAGER_ONLY = Implementation("eager_only", load=lambda: right, compiles=False)
