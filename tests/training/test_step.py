"""One optimizer step: clipping, loss scaling, and steps that overflow skips for good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmmed.config import Config
from llmmed.model import IGNORE_INDEX, Transformer
from llmmed.training import checkpoint
from llmmed.training.micro_step import LaunchedMicroStep
from llmmed.training.step import Stepper
from tests.training.tiny import build, relative_error, tiny_config

TOKENS = torch.arange(17).repeat(4, 1)
FIRST_MOMENTS = {"exp_avg": 0.1, "momentum_buffer": 0.05}  # AdamW's and Muon's: the weight of the newest gradient


def stepper_of(model: Transformer, config: Config) -> Stepper:
    return Stepper(model, LaunchedMicroStep(model, list(model.parameters())), config)


def first_moments(stepper: Stepper) -> list[tuple[Tensor, float]]:
    """Of each parameter, in their order, with the weight of the newest gradient: they know a gradient's scale, which
    AdamW's and Muon's updates do not."""
    found = sorted(stepper.tensors().items())
    return [(tensor, FIRST_MOMENTS[key]) for name, tensor in found if (key := name.partition(".")[2]) in FIRST_MOMENTS]


def noise(rows: int) -> Tensor:
    """Sequences [rows, seq + 1] of random tokens: the gradients of any two differ."""
    return torch.randint(64, (rows, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("grad_clip", [0.05, 100.0])
def test_accumulated_gradients_are_those_of_one_batch(optimizer: str, grad_clip: float) -> None:
    config = tiny_config(f"optimizer={optimizer}", f"train.grad_clip={grad_clip}")
    whole, parts = build(config), build(config)
    first, second = stepper_of(whole, config), stepper_of(parts, config)
    for step in range(2):
        parts.load_state_dict(whole.state_dict())  # Muon's iteration, in 16 bits, makes more of a rounding
        loss, norm = first.run(step, [noise(4)], 1)
        assert (norm > grad_clip) == (grad_clip < 1)
        torch.testing.assert_close(second.run(step, noise(4).split(1), 4), (loss, norm))
        for (found, _), (expected, _) in zip(first_moments(second), first_moments(first), strict=True):
            assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_count_alike_however_many_of_their_targets_are_ignored(optimizer: str) -> None:
    config = tiny_config(f"optimizer={optimizer}", "train.grad_clip=0")
    model = build(config)
    smallest = torch.tensor([[32], [8], [0]])
    batches = (noise(3) // 2 + smallest).split(1)  # none, most and all of whose tokens are below 32

    def mean_loss(tokens: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = model(tokens, targets.where(targets >= 32, IGNORE_INDEX), scale)
        return result

    losses = torch.stack([mean_loss(batch[:, :-1], batch[:, 1:], torch.ones(())) for batch in batches])
    assert (losses > 0).tolist() == [True, True, False]
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
    stepper = Stepper(model, LaunchedMicroStep(mean_loss, list(model.parameters())), config)
    loss, norm = stepper.run(0, batches, 3)
    torch.testing.assert_close(loss, losses.detach().mean())
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(gradients))
    for (found, weight), gradient in zip(first_moments(stepper), gradients, strict=True):
        assert relative_error(found, weight * gradient) < 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("grad_clip", [0.05, 100.0])
def test_clipping_is_that_of_torch(optimizer: str, grad_clip: float) -> None:
    config = tiny_config(f"optimizer={optimizer}", f"train.grad_clip={grad_clip}", "optimizer.warmup_steps=0")
    ours, theirs = build(config), build(config)
    stepper = stepper_of(ours, config)
    means = [torch.zeros_like(parameter) for parameter in theirs.parameters()]
    for step in range(3):
        theirs.load_state_dict(ours.state_dict())
        theirs.zero_grad()
        theirs(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip)
        assert (expected > grad_clip) == (grad_clip < 1)
        _, norm = stepper.run(step, [TOKENS], 1)
        torch.testing.assert_close(norm, expected)
        for mean, (found, weight), other in zip(means, first_moments(stepper), theirs.parameters(), strict=True):
            assert other.grad is not None
            assert relative_error(found, mean.lerp_(other.grad, weight)) < 1e-4


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    config = tiny_config("train.precision=fp16")
    model = build(config)
    factor = torch.ones(())

    def loss(tokens: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = model(tokens, targets, scale) * factor
        return result

    stepper = Stepper(model, LaunchedMicroStep(loss, list(model.parameters())), config)
    stepper.run(0, [TOKENS], 1)
    scale, before = float(stepper.scale), [p.detach().clone() for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in stepper.tensors().items() if "exp_avg" in name}
    factor.fill_(float("inf"))
    stepper.run(1, [TOKENS], 1)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(stepper.tensors()[name], old) for name, old in state.items())
    assert float(stepper.scale) == scale / 2
    assert (int(stepper.skipped), int(stepper.skipped_in_a_row)) == (1, 1)
    factor.fill_(1.0)
    stepper.run(2, [TOKENS], 1)
    assert (int(stepper.skipped), int(stepper.skipped_in_a_row)) == (1, 0)
    assert not torch.equal(next(iter(model.parameters())), before[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("broken", ["loss", "gradients"])
def test_a_step_that_is_not_finite_is_skipped_whatever_the_optimizer(optimizer: str, broken: str) -> None:
    config = tiny_config(f"optimizer={optimizer}")
    model = build(config)
    factor, summand = torch.ones(()), torch.zeros(())

    def loss(tokens: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = model(tokens, targets, scale) * factor + summand
        return result

    stepper = Stepper(model, LaunchedMicroStep(loss, list(model.parameters())), config)
    stepper.run(0, [TOKENS], 1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    state = {name: tensor.clone() for name, tensor in stepper.tensors().items() if "skipped" not in name}
    (summand if broken == "loss" else factor).fill_(float("nan"))
    for _ in range(2):
        stepper.run(1, [TOKENS], 1)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(stepper.tensors()[name], old) for name, old in state.items())
    assert (int(stepper.skipped), int(stepper.skipped_in_a_row)) == (2, 2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("grad_clip", [0.05, 0.0])
def test_the_scale_does_not_change_the_update(optimizer: str, grad_clip: float) -> None:
    config = tiny_config("train.precision=fp32", f"optimizer={optimizer}", f"train.grad_clip={grad_clip}")
    plain, scaled = build(config), build(config)
    first, second = stepper_of(plain, config), stepper_of(scaled, config)
    second.scale.fill_(1024.0)
    for step in range(2):
        expected, found = (stepper.run(step, [TOKENS], 1) for stepper in (first, second))
        for (mine, _), (other, _) in zip(first_moments(first), first_moments(second), strict=True):
            assert relative_error(other, mine) < 1e-4
        torch.testing.assert_close(found, expected)
    for mine, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_copies_train_as_casts_do_and_either_goes_on_where_the_other_was(
    tmp_path: Path, optimizer: str, precision: str
) -> None:
    config = tiny_config(
        f"train.precision={precision}", f"optimizer={optimizer}", "optimizer.warmup_steps=0", "optimizer.lr=0.01"
    )
    casting, copying = build(config), build(config)
    start = [parameter.detach().clone() for parameter in casting.parameters()]
    copying.keep_copies()
    first, second = (Stepper(model, LaunchedMicroStep(model, model.leaves), config) for model in (casting, copying))
    for step in range(4):
        if step == 2:  # both go on with what the other one has written
            for stepper, model in ((first, casting), (second, copying)):
                checkpoint.save(tmp_path / str(id(model)), step, model.state_dict(), stepper.tensors(), {}, keep=1)
            for stepper, model, other in ((first, casting, copying), (second, copying, casting)):
                (folder,) = (tmp_path / str(id(other))).iterdir()
                found = checkpoint.load(folder)
                assert found.optimizer.keys() == stepper.tensors().keys()
                model.load_state_dict(found.model)
                stepper.restore(found.optimizer, scaled=True)
        losses, norms = zip(*(each.run(step, [TOKENS], 1) for each in (first, second)), strict=True)
        torch.testing.assert_close(*losses, rtol=2e-3, atol=0)
        torch.testing.assert_close(*norms, rtol=2e-2, atol=0)
        for mine, other, old in zip(copying.parameters(), casting.parameters(), start, strict=True):
            # Roundings grow from step to step, in 16 bits and in Muon's iteration.
            assert (mine - other).norm() < (0.1 if step else 1e-3) * (other - old).norm()
    for parameter, copy in copying.copies.items():
        assert torch.equal(copy, parameter.to(copy.dtype))


def test_norms_are_not_decayed() -> None:
    config = tiny_config("optimizer.weight_decay=0.3")
    model = build(config)
    groups = stepper_of(model, config).optimizers[0].param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim == 2), name


def test_state_survives_a_round_trip() -> None:
    config = tiny_config()
    model = build(config)
    stepper = stepper_of(model, config)
    stepper.run(0, [TOKENS], 1)
    copy = build(config)
    copy.load_state_dict(model.state_dict())
    other = stepper_of(copy, config)
    other.restore({name: tensor.clone() for name, tensor in stepper.tensors().items()}, scaled=False)
    for one in (stepper, other):
        one.run(1, [TOKENS], 1)
    for mine, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("before", "now", "scale"),
    [("fp32", "fp16", 2.0**15), ("fp16", "fp16", 4.0), ("fp16", "fp32", 1.0), ("bf16", "bf16", 1.0)],
)
def test_the_loss_scale_goes_on_only_from_fp16_to_fp16(before: str, now: str, scale: float) -> None:
    first, second = (tiny_config(f"train.precision={precision}") for precision in (before, now))
    stepper, other = stepper_of(build(first), first), stepper_of(build(second), second)
    if before == "fp16":
        stepper.scale.fill_(4.0)
    stepper.skipped.fill_(3)
    other.restore(stepper.tensors(), scaled=before == "fp16")
    assert (float(other.scale), int(other.skipped)) == (scale, 3)
