"""Muon, batched: all matrices of one shape are orthogonalised in one call of the kernel table's `newton_schulz`.

Momentum, orthogonalisation by Newton-Schulz, decoupled weight decay (Jordan et al. 2024; scaling of the update as in
Liu et al. 2025, arXiv:2502.16982). Step for step it computes what `torch.optim.Muon` computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmmed.optim.fusing import fused

Adjust = Literal["original", "match_rms_adamw"]


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices; everything that is no hidden matrix belongs to another optimizer.

    Args:
        params: Matrices [rows, cols].
        newton_schulz: `[n, rows, cols] bfloat16 -> the same`, the table's.
        lr: A number or a 0-d tensor.
        weight_decay: Decoupled: parameters shrink by `lr * weight_decay` a step.
        momentum: Of the running mean of gradients, Nesterov's.
        adjust: How the update grows with the shape: `original` sqrt(max(1, rows / cols)), or `match_rms_adamw`
            0.2 sqrt(max(rows, cols)), under which learning rates tuned for AdamW fit.
        splits: For a parameter that is several matrices above each other, the rows of each. They are orthogonalised one
            by one. Rows of any other parameter are one matrix.
        copies: Of parameters, in 16 bits, that the model computes with: gradients of these arrive at the copy, which is
            written with its parameter.

    As with PyTorch's fused AdamW, gradients are divided by the attribute `grad_scale` and the whole step is skipped
    where `found_inf` is not 0; both are 0-d tensors or None, and neither is read by the host.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        newton_schulz: Callable[[Tensor], Tensor],
        *,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        adjust: Adjust = "match_rms_adamw",
        splits: Mapping[nn.Parameter, Sequence[int]] | None = None,
        copies: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "adjust": adjust})
        self.newton_schulz = newton_schulz
        self._splits, self._copies = dict(splits or {}), dict(copies or {})
        for parameter in self._parameters():
            rows = self._rows(parameter)
            if parameter.ndim != 2 or sum(rows) != parameter.shape[0]:
                raise ValueError(f"Muon takes matrices, split by rows; not {tuple(parameter.shape)} in {rows}")
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. `closure` must be None."""
        if closure is not None:
            raise ValueError("Muon does not evaluate closures")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if self._copies.get(p, p).grad is not None]
            if parameters:
                self._step_group(parameters, group)

    def _step_group(self, parameters: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        device = parameters[0].device
        scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
        found_inf = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.tensor(group["lr"], device=device)
        layout = tuple((tuple(p.shape), self._rows(p)) for p in parameters)
        leaves = [self._copies.get(p, p) for p in parameters]
        stacks = fused(_update_momentum, scale)(
            [leaf.grad for leaf in leaves if leaf.grad is not None],
            [self.state[p]["momentum_buffer"] for p in parameters], layout, scale, found_inf, group["momentum"],
        )  # fmt: skip
        orthogonal = [self.newton_schulz(stack) for stack in stacks]
        copies = [self._copies[p].detach() if p in self._copies else None for p in parameters]
        fused(_update_parameters, scale)(
            [p.detach() for p in parameters], copies, orthogonal, layout, lr, found_inf, group["weight_decay"],
            group["adjust"],
        )  # fmt: skip

    def _rows(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(self._splits.get(parameter, (parameter.shape[0],)))

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


Layout = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # per parameter: its shape, the rows of its matrices


def stack_shapes(layout: Layout) -> list[tuple[int, int, int]]:
    """The stacks [n, rows, cols] that a step orthogonalises, in order; no matrix is taller than wide."""
    counts: dict[tuple[int, int], int] = {}
    for shape, rows in layout:
        for height in rows:
            key = (min(height, shape[1]), max(height, shape[1]))
            counts[key] = counts.get(key, 0) + 1
    return [(count, *key) for key, count in counts.items()]


def _update_momentum(
    grads: list[Tensor], buffers: list[Tensor], layout: Layout, scale: Tensor, found_inf: Tensor, momentum: float
) -> list[Tensor]:
    """Advances the buffers in place; returns Nesterov's look-ahead, in bfloat16, stacked by shape."""
    skip, inverse = found_inf != 0, 1 / scale
    stacks: dict[tuple[int, int], list[Tensor]] = {}
    for grad, buffer, (_, rows) in zip(grads, buffers, layout, strict=True):
        # Not by arithmetic: zero times infinity is not zero.
        usable = torch.where(skip, 0.0, grad.float() * inverse)
        advanced = torch.where(skip, buffer, buffer.lerp(usable, 1 - momentum))
        buffer.copy_(advanced)
        for matrix in usable.lerp(advanced, momentum).bfloat16().split(rows):
            wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
            stacks.setdefault((wide.shape[0], wide.shape[1]), []).append(wide)
    return [torch.stack(matrices) for matrices in stacks.values()]


def _update_parameters(
    parameters: list[Tensor],
    copies: list[Tensor | None],
    orthogonal: list[Tensor],
    layout: Layout,
    lr: Tensor,
    found_inf: Tensor,
    weight_decay: float,
    adjust: Adjust,
) -> None:
    """Weight decay, then the orthogonalised update, both in place, into the copies as well."""
    lr = torch.where(found_inf != 0, 0.0, lr)
    order = {shape[1:]: (stack, iter(range(shape[0]))) for shape, stack in
             zip(stack_shapes(layout), orthogonal, strict=True)}  # fmt: skip
    for parameter, copy, (_, rows) in zip(parameters, copies, layout, strict=True):
        parts = []
        for part in parameter.split(rows):
            height, width = part.shape
            stack, position = order[(min(height, width), max(height, width))]
            found = stack[next(position)]
            direction = torch.where(found_inf != 0, 0.0, (found.mT if height > width else found).float())
            parts.append(part * (1 - lr * weight_decay) - lr * _growth(height, width, adjust) * direction)
        updated = torch.cat(parts) if len(parts) > 1 else parts[0]
        parameter.copy_(updated)
        if copy is not None:
            copy.copy_(updated)


def _growth(rows: int, cols: int, adjust: Adjust) -> float:
    return math.sqrt(max(1.0, rows / cols)) if adjust == "original" else 0.2 * math.sqrt(max(rows, cols))
