"""One optimizer step: micro-batches forward and backward, clipping, and an update that overflow skips on the device.

Nothing here waits for the device. Losses, norms and the count of skipped steps stay there until they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llmmed.config import Config
from llmmed.model import Transformer
from llmmed.optim import build_optimizers, learning_rate
from llmmed.training.micro_step import MicroStep

_FIRST_SCALE, _GROWTH, _BACKOFF, _GROWTH_INTERVAL = 2.0**15, 2.0, 0.5, 1000


class Stepper:
    """The optimizers with loss scaling and clipping.

    Args:
        model: Its parameters are updated, and their copies, which are there from before if it keeps any.
        micro_step: Computes its gradients.
        config: The run's.
    """

    def __init__(self, model: Transformer, micro_step: MicroStep, config: Config) -> None:
        device = next(model.parameters()).device
        self.optimizers = build_optimizers(model, config.optimizer)
        self._parameters, self._leaves = list(model.parameters()), model.leaves
        self._owners = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        self._micro_step, self._config = micro_step, config
        self._scaled = config.train.precision == "fp16"
        self.scale = torch.full((), _FIRST_SCALE if self._scaled else 1.0, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int32, device=device)

    def run(self, step: int, micro_batches: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
        """Step `step` over `count` micro-batches [batch, seq + 1]. Returns the mean loss and the gradient norm, 0-d."""
        total, scale = torch.zeros((), device=self.scale.device), self.scale / count
        for index, batch in enumerate(micro_batches):
            total += self._micro_step.run(batch, scale, first=index == 0)
        total /= self.scale  # before the update changes it
        norm = self._update(learning_rate(step, self._config.optimizer, self._config.train.max_steps), total)
        return total, norm

    @torch.no_grad()
    def _update(self, lr: float, loss: Tensor) -> Tensor:
        norm = _norm([leaf.grad for leaf in self._leaves if leaf.grad is not None]) / self.scale
        found_inf = (~(norm + loss).isfinite()).float()
        divisor = self.scale
        if self._config.train.grad_clip > 0:
            # What `clip_grad_norm_` multiplies by, folded into the update's own division.
            divisor = divisor * (norm / self._config.train.grad_clip).nan_to_num(posinf=1.0).clamp(min=1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"].fill_(lr)
            optimizer.grad_scale, optimizer.found_inf = divisor, found_inf  # type: ignore[attr-defined]
            optimizer.step()
        self.skipped += found_inf.int()
        self.skipped_in_a_row.add_(1).mul_(found_inf.int())
        if self._scaled:
            torch._amp_update_scale_(self.scale, self.growth_tracker, found_inf, _GROWTH, _BACKOFF, _GROWTH_INTERVAL)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """All of its state, by stable names; `restore` takes it back."""
        names = {id(p): i for i, p in enumerate(self._parameters)}
        states = [item for optimizer in self.optimizers for item in optimizer.state.items()]
        found = {f"{names[id(p)]:04d}.{key}": value for p, state in states for key, value in state.items()}
        return {**found, **{name: getattr(self, name) for name in _OWN}}

    def restore(self, tensors: dict[str, Tensor], *, scaled: bool) -> None:
        """Continues where `tensors` was taken, bit for bit. Its loss scale is taken over only if it was `scaled`."""
        for name, tensor in tensors.items():
            if name in _OF_SCALING and not (scaled and self._scaled):
                continue
            if name in _OWN:
                getattr(self, name).copy_(tensor)
                continue
            index, _, key = name.partition(".")
            parameter = self._parameters[int(index)]
            self._owners[parameter].state[parameter][key].copy_(tensor)


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all together, a 0-d float32 tensor."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    norms = [norm for alike in by_dtype.values() for norm in torch._foreach_norm(alike, 2, torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms))  # type: ignore[no-any-return]


_OF_SCALING = ("scale", "growth_tracker")
_OWN = (*_OF_SCALING, "skipped", "skipped_in_a_row")
