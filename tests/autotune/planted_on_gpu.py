"""Implementations of `rms_norm` that misbehave on a GPU, each in its own way; a test installs this file as a package.

Those that must get past the gate are operators, so that they run their Python at every launch and at every capture.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.operator import make_operator


def _plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    # By hand: an operator's body lies below autograd.
    x_wide, dy_wide = x.float(), dy.float()
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    x_hat, scaled = x_wide * rstd, dy_wide * weight
    dx = (scaled - x_hat * (scaled * x_hat).mean(-1, keepdim=True)) * rstd
    return dx.to(x.dtype), (dy_wide * x_hat).flatten(0, -2).sum(0).to(weight.dtype)


def _planted(
    name: str,
    forward: Callable[[Tensor, Tensor, float], Tensor] = _plain,
    backward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = _gradients,
) -> Implementation:
    def run_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor]:
        return (forward(x, weight, eps),)

    def run_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return backward(dy, x, weight, eps)

    operator = make_operator(
        f"planted::{name}",
        forward=run_forward,
        fake_forward=lambda x, weight, eps: (x.new_empty(x.shape),),
        backward=run_backward,
        fake_backward=lambda dy, x, weight, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
        save=lambda arguments, results: arguments,
        gradients=("x", "weight"),
    )
    return Implementation(name, load=lambda: operator, devices=("cuda",))


def _two_per_cent(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx, dweight = _gradients(dy, x, weight, eps)
    return dx, 1.02 * dweight


def _without_gradient(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _plain(x, weight, eps).detach()


def _mutating(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = _plain(x, weight, eps)
    x.mul_(2)
    return y


def _sleeping(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    torch.cuda._sleep(2_000_000)  # cycles: about a millisecond
    return _plain(x, weight, eps)


def _sleeping_in_the_step(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if any(frame.filename.endswith("step_clock.py") for frame in inspect.stack(context=0)):
        torch.cuda._sleep(2_000_000)
    return _plain(x, weight, eps)


def _waiting(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _plain(x, weight, eps + 0.0 * x.flatten()[0].item())


_kept: dict[torch.Size, Tensor] = {}


def _stale_when_captured(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        return _kept[x.shape].clone()
    y = _plain(x, weight, eps)
    _kept[x.shape] = y.clone()
    return y


def _greedy(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    torch.empty(2**42, dtype=torch.int8, device=x.device)
    return _plain(x, weight, eps)


@triton.jit
def _no_such_function_kernel(x_ptr):
    tl.store(x_ptr, tl.no_such_function(tl.load(x_ptr)))


@triton.jit
def _endless_to_compile_kernel(x_ptr):
    total = tl.load(x_ptr).to(tl.float32)
    for _ in tl.static_range(0, 100_000_000):
        total = tl.sin(total) + 1.0
    tl.store(x_ptr, total.to(x_ptr.dtype.element_ty))


@triton.jit
def _foreign_memory_kernel(x_ptr):
    tl.store(x_ptr + (tl.program_id(0).to(tl.int64) + 1) * (1 << 44), 0.0)


def _launching(kernel: Any) -> Callable[[Tensor, Tensor, float], Tensor]:
    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = _plain(x, weight, eps)
        kernel[(16,)](y)
        return y

    return forward


WRONG_GRADIENT = _planted("wrong_gradient", backward=_two_per_cent)
NO_BACKWARD = Implementation("no_backward", load=lambda: _without_gradient, devices=("cuda",))
MUTATING = _planted("mutating", _mutating)
SLOW = _planted("slow", _sleeping)
SLOW_IN_THE_STEP = _planted("slow_in_the_step", _sleeping_in_the_step)
GREEDY = _planted("greedy", _greedy)
DOES_NOT_COMPILE = _planted("does_not_compile", _launching(_no_such_function_kernel))
HANGS_THE_COMPILER = _planted("hangs_the_compiler", _launching(_endless_to_compile_kernel))
ILLEGAL_ACCESS = _planted("illegal_access", _launching(_foreign_memory_kernel))
WAITS_FOR_THE_DEVICE = _planted("waits_for_the_device", _waiting)
STALE_UNDER_GRAPHS = _planted("stale_under_graphs", _stale_when_captured)
