"""AdamW (Loshchilov and Hutter 2019), with weight decay for matrices only: PyTorch's, or over copies in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmmed.config import OptimizerConfig
from llmmed.optim.fusing import fused


def build_adamw(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, copies: Mapping[nn.Parameter, Tensor] | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW over these parameters: PyTorch's, fused, and where there are copies of matrices, `CopiedAdamW` over all
    matrices. Norm weights are not decayed: they are scales, and zero is no natural value for them.

    The learning rate is a 0-d tensor, so that a schedule neither recompiles nor synchronises. The moments exist from
    the start: CUDA graphs are captured before the first step, and the memory measured then should be all of the run's.
    Both keep the same state under the same names, so that a checkpoint of one goes on in the other.
    """
    given = list(parameters)
    lr = torch.tensor(config.lr, dtype=torch.float32, device=given[0].device)
    groups = decay_groups(given, config.weight_decay)
    found: list[torch.optim.Optimizer] = []
    if copies and any(parameter in copies for parameter in given):
        matrices = groups.pop(0)
        found.append(
            CopiedAdamW(
                matrices["params"], copies, lr=lr, betas=config.betas, eps=config.eps,
                weight_decay=matrices["weight_decay"],
            )
        )  # fmt: skip
    plain = torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)
    for parameter in (p for group in groups for p in group["params"]):
        plain.state[parameter] = _state(parameter)
    return [*found, plain]


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """An optimizer's parameter groups: matrices, which decay, and everything else, which does not."""
    given = list(parameters)
    return [
        {"params": [p for p in given if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in given if p.ndim < 2], "weight_decay": 0.0},
    ]


class CopiedAdamW(torch.optim.Optimizer):
    """AdamW over float32 parameters, some of which have copies in 16 bits that the model computes with.

    A copy's gradient is taken as it is, in 16 bits, and the copy is written with its parameter: a parameter costs 28
    bytes of traffic a step, where casting its gradient, PyTorch's fused update, which also writes the gradients that it
    has unscaled, and casting the parameter again cost 44. What is computed is the same but for the order of roundings,
    where all parameters have been updated as often: one count of steps corrects the moments of all.

    Args:
        params: float32, on one device.
        copies: Of some of them, by parameter. Gradients of these arrive at the copy, of the others at themselves.
        lr: A 0-d tensor.
        betas, eps, weight_decay: As of `torch.optim.AdamW`.

    As with PyTorch's fused AdamW, gradients are divided by the attribute `grad_scale` and the whole step is skipped
    where `found_inf` is not 0; both are 0-d tensors or None, and neither is read by the host.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable[nn.Parameter], copies: Mapping[nn.Parameter, Tensor], *, lr: Tensor,
        betas: tuple[float, float], eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        # A compiled function looks first at the shapes it was called with last: alike ones in a row are found at once.
        in_order = sorted(params, key=lambda parameter: tuple(parameter.shape))
        super().__init__(in_order, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._copies = dict(copies)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _state(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. `closure` must be None."""
        if closure is not None:
            raise ValueError("CopiedAdamW does not evaluate closures")
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            scale = torch.ones_like(lr) if self.grad_scale is None else self.grad_scale
            found_inf = torch.zeros_like(lr) if self.found_inf is None else self.found_inf
            given = [(p, leaf.grad) for p in group["params"] if (leaf := self._copies.get(p, p)).grad is not None]
            if not given:
                continue
            steps = [self.state[parameter]["step"] for parameter, _ in given]
            torch._foreach_add_(steps, 1.0)
            torch._foreach_sub_(steps, [found_inf] * len(steps))
            scalars = fused(_scalars, lr)(steps[0], lr, scale, beta1, beta2, group["eps"], group["weight_decay"])
            update = fused(_update, lr)
            for parameter, gradient in given:
                state, copy = self.state[parameter], self._copies.get(parameter)
                update(
                    parameter.detach(), gradient, state["exp_avg"], state["exp_avg_sq"],
                    None if copy is None else copy.detach(), *scalars, found_inf, beta1, beta2,
                )  # fmt: skip


def _state(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _scalars(
    count: Tensor, lr: Tensor, scale: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What all elements have in common in step `count`: the factor of a gradient, what is left of a parameter, and the
    update as `size * exp_avg / (sqrt(exp_avg_sq) + floor)`.
    """
    # 1 - beta^t, where that subtraction would cancel in float32.
    logarithms = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    correction1, correction2 = (-torch.expm1(count * logarithm) for logarithm in logarithms)
    root = correction2.sqrt()
    return 1 / scale, 1 - lr * weight_decay, lr * root / correction1, eps * root


def _update(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None, inverse: Tensor,
    decay: Tensor, size: Tensor, floor: Tensor, found_inf: Tensor, beta1: float, beta2: float,
) -> None:  # fmt: skip
    """Advances a parameter, its moments and its copy in place, or leaves all as they are.

    One at a time: compiled for a model's few shapes it takes seconds, for all of its parameters at once ten times that.
    """
    # Not by arithmetic: zero times infinity is not zero.
    skip = found_inf != 0
    usable = gradient.float() * inverse
    first = torch.where(skip, exp_avg, exp_avg.lerp(usable, 1 - beta1))
    second = torch.where(skip, exp_avg_sq, exp_avg_sq * beta2 + usable * usable * (1 - beta2))
    updated = torch.where(skip, parameter, parameter * decay - size * first / (second.sqrt() + floor))
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    parameter.copy_(updated)
    if copy is not None:
        copy.copy_(updated)
