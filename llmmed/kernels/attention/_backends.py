"""PyTorch's attention backends, each called by its own operator, so that the choice stands in the graph.

A backend picked through global flags is invisible to the compiler: its cache may return a graph with another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.base import Unavailable

Backend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [batch, heads, seq, head_dim], equal numbers of heads


def load_backend(backend: Backend, needs_capability: tuple[int, int]) -> Callable[..., Any]:
    """`attention` through one backend. Raises `Unavailable` without a GPU of that compute capability."""
    require_capability(*needs_capability)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `reference.attention`."""
        group = q.size(2) // k.size(2)
        if group > 1:
            k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        return backend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return attention


def require_capability(major: int, minor: int) -> None:
    """Raises `Unavailable` without a GPU of that compute capability or a newer one."""
    if not torch.cuda.is_available():
        raise Unavailable("needs a CUDA GPU, and torch sees none")
    if torch.cuda.get_device_capability() < (major, minor):
        raise Unavailable(f"needs a GPU of compute capability {major}.{minor} or newer")
