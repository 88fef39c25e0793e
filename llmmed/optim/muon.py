"""Muon, batched: all matrices of one shape are orthogonalised in one call of the kernel table's `newton_schulz`.

Momentum, orthogonalisation by Newton-Schulz, decoupled weight decay (Jordan et al. 2024; scaling of the update as in
Liu et al. 2025, arXiv:2502.16982). Step for step it computes what `torch.optim.Muon` computes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
                # A compiled function looks first at the shapes it was called with last.
                self._step_group(sorted(parameters, key=lambda p: tuple(p.shape)), group)

    def _step_group(self, parameters: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        device = parameters[0].device
        scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
        found_inf = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.tensor(group["lr"], device=device)
        layout = tuple((tuple(p.shape), self._rows(p)) for p in parameters)
        stacks = {shape[1:]: torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in stack_shapes(layout)}
        advance = fused(_advance, scale)
        for parameter, (runs, slabs) in zip(parameters, slabs_of(stacks, layout), strict=True):
            leaf, buffer = self._copies.get(parameter, parameter), self.state[parameter]["momentum_buffer"]
            assert leaf.grad is not None
            advance(leaf.grad, buffer, slabs, runs, scale, found_inf, group["momentum"])
        orthogonal = {key: self.newton_schulz(stack) for key, stack in stacks.items()}
        update = fused(_update, scale)
        for parameter, (runs, slabs) in zip(parameters, slabs_of(orthogonal, layout), strict=True):
            copy = self._copies[parameter].detach() if parameter in self._copies else None
            update(parameter.detach(), copy, slabs, runs, lr, found_inf, group["weight_decay"], group["adjust"])

    def _rows(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(self._splits.get(parameter, (parameter.shape[0],)))

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


Layout = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # per parameter: its shape, the rows of its matrices
Run = tuple[int, int]  # matrices of one height above each other: their number, and rows of each


def stack_shapes(layout: Layout) -> list[tuple[int, int, int]]:
    """The stacks [n, rows, cols] that a step orthogonalises, in order; no matrix is taller than wide."""
    counts: dict[tuple[int, int], int] = {}
    for shape, rows in layout:
        for height in rows:
            key = _wide(height, shape[1])
            counts[key] = counts.get(key, 0) + 1
    return [(count, *key) for key, count in counts.items()]


def slabs_of(
    stacks: Mapping[tuple[int, int], Tensor], layout: Layout
) -> Iterator[tuple[tuple[Run, ...], list[Tensor]]]:
    """For each parameter its runs, and for each of these its part of the stacks, [n, rows, cols]."""
    used = dict.fromkeys(stacks, 0)
    for shape, rows in layout:
        runs = tuple((len(list(same)), height) for height, same in itertools.groupby(rows))
        slabs = []
        for count, height in runs:
            key = _wide(height, shape[1])
            slabs.append(stacks[key][used[key] : used[key] + count])
            used[key] += count
        yield runs, slabs


def _wide(rows: int, cols: int) -> tuple[int, int]:
    return min(rows, cols), max(rows, cols)


# Both take one parameter at a time: compiled for a model's few shapes they take seconds, for all of its parameters at
# once a minute in a model of 64 matrices.


def _advance(
    gradient: Tensor, buffer: Tensor, slabs: list[Tensor], runs: tuple[Run, ...], scale: Tensor, found_inf: Tensor,
    momentum: float,
) -> None:  # fmt: skip
    """Advances the buffer in place, and writes Nesterov's look-ahead to the slabs."""
    # Not by arithmetic: zero times infinity is not zero.
    skip = found_inf != 0
    usable = torch.where(skip, 0.0, gradient.float() * (1 / scale))
    advanced = torch.where(skip, buffer, buffer.lerp(usable, 1 - momentum))
    ahead = usable.lerp(advanced, momentum).bfloat16()
    buffer.copy_(advanced)
    for part, slab, (count, height) in zip(_parts(ahead, runs), slabs, runs, strict=True):
        matrices = part.view(count, height, -1)
        slab.copy_(matrices.mT if height > matrices.shape[2] else matrices)


def _update(
    parameter: Tensor, copy: Tensor | None, slabs: list[Tensor], runs: tuple[Run, ...], lr: Tensor, found_inf: Tensor,
    weight_decay: float, adjust: Adjust,
) -> None:  # fmt: skip
    """Weight decay, then the orthogonalised update, both in place, into the copy as well."""
    lr = torch.where(found_inf != 0, 0.0, lr)
    parts = []
    for part, slab, (_, height) in zip(_parts(parameter, runs), slabs, runs, strict=True):
        width = part.shape[1]
        found = (slab.mT if height > width else slab).reshape(part.shape)
        direction = torch.where(found_inf != 0, 0.0, found.float())
        parts.append(part * (1 - lr * weight_decay) - lr * _growth(height, width, adjust) * direction)
    updated = torch.cat(parts) if len(parts) > 1 else parts[0]
    parameter.copy_(updated)
    if copy is not None:
        copy.copy_(updated)


def _parts(matrix: Tensor, runs: tuple[Run, ...]) -> Sequence[Tensor]:
    return torch.split(matrix, [count * height for count, height in runs])


def _growth(rows: int, cols: int, adjust: Adjust) -> float:
    return math.sqrt(max(1.0, rows / cols)) if adjust == "original" else 0.2 * math.sqrt(max(rows, cols))
