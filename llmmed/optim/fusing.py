"""Updates as a few kernels: eagerly, each line would be a launch for each parameter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., object])
_MOST_SHAPES = 64  # of the parameters in one process; PyTorch's limit of 8 would be an error


_backend: str | Callable[..., Any] = "inductor"


def fused(function: F, where: Tensor) -> F:
    """The same function, compiled if this tensor is on a GPU."""
    return cast("F", compiled(function)) if where.device.type == "cuda" else function


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """The same function, compiled: the same each time, unless another backend is asked for."""
    return _by_inductor(function) if _backend == "inductor" else _by(_backend, function)


@contextlib.contextmanager
def fused_by(backend: Callable[..., Any]) -> Iterator[None]:
    """Lets another backend than Inductor compile."""
    global _backend
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


@functools.cache
def _by_inductor(function: Callable[..., object]) -> Callable[..., object]:
    return _by("inductor", function)


def _by(backend: str | Callable[..., Any], function: Callable[..., object]) -> Callable[..., object]:
    torch._dynamo.config.recompile_limit = max(_MOST_SHAPES, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
