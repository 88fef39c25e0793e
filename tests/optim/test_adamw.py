"""Our AdamW is PyTorch's, with its state in memory from the start; over copies in 16 bits it computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmmed.compose import compose
from llmmed.optim.adamw import CopiedAdamW, build_adamw, decay_groups


def test_the_moments_exist_before_the_first_step_and_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 4), (4,))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    config = compose(["optimizer.lr=0.01", "optimizer.weight_decay=0.1", "data=synthetic"]).optimizer
    (built,) = build_adamw(ours, config)
    plain = torch.optim.AdamW(
        decay_groups(theirs, 0.1), lr=torch.tensor(0.01), betas=config.betas, eps=config.eps, fused=True
    )
    assert all(built.state[p]["exp_avg_sq"].shape == p.shape for p in ours)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = mine.grad = torch.randn(mine.shape, generator=generator)
        built.step()
        plain.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    mine, other = built.state_dict()["state"], plain.state_dict()["state"]
    assert all(torch.equal(mine[n][key], other[n][key]) for n in other for key in other[n])


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def with_copies(device: str, dtype: torch.dtype) -> tuple[list[nn.Parameter], dict[nn.Parameter, Tensor]]:
    """Three matrices and a vector; two of the matrices have copies."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((48, 20), (7, 33), (40, 8), (20,))
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    return parameters, {p: p.detach().to(dtype).requires_grad_() for p in parameters[:2]}


def give_gradients(leaves: list[Tensor], seed: int, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """Values of `dtype` times `scale`, a power of two, to each; returns the values themselves, in float64."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(leaf.shape, generator=generator).to(dtype).to(leaf.device).double() for leaf in leaves]
    for leaf, drawn in zip(leaves, values, strict=True):
        leaf.grad = (drawn * scale).to(leaf.dtype)
    return values


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("betas", ["0.9,0.95", "0,0.999", "0.9,0"])
def test_over_copies_it_takes_the_steps_of_torch(device: str, dtype: torch.dtype, betas: str) -> None:
    ours, copies = with_copies(device, dtype)
    theirs = [nn.Parameter(p.detach().double()) for p in ours]
    given = ["optimizer.lr=0.01", "optimizer.weight_decay=0.1", f"optimizer.betas=[{betas}]", "data=synthetic"]
    config = compose(given).optimizer
    built = build_adamw(ours, config, copies)
    groups = decay_groups(theirs, 0.1)
    plain = torch.optim.AdamW(groups, lr=0.01, betas=config.betas, eps=config.eps)
    for step in range(4):
        values = give_gradients([copies.get(p, p) for p in ours], step, 64.0, dtype)
        other: Tensor
        for other, value in zip(theirs, values, strict=True):
            other.grad = value
        for optimizer in built:
            optimizer.grad_scale, optimizer.found_inf = (  # type: ignore[attr-defined]
                torch.tensor(value, device=device) for value in (64.0, 0.0)
            )
            optimizer.step()
        plain.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=2e-6, atol=2e-7)
    for parameter, copy in copies.items():
        assert torch.equal(copy, parameter.detach().to(dtype))
    for optimizer in built:
        for parameter, state in optimizer.state.items():
            expected = plain.state[next(o for m, o in zip(ours, theirs, strict=True) if m is parameter)]
            assert list(state) == list(expected)
            # Without momentum PyTorch's own fused update still adds the old gradient and takes it away again.
            atol = 1e-7 if isinstance(optimizer, CopiedAdamW) or device == "cpu" else 5e-7
            for key, value in state.items():
                torch.testing.assert_close(value.double().cpu(), expected[key].double().cpu(), rtol=2e-6, atol=atol)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_over_copies_an_overflow_changes_nothing(device: str) -> None:
    parameters, copies = with_copies(device, torch.float16)
    config = compose(["data=synthetic"]).optimizer
    built = build_adamw(parameters, config, copies)
    leaves = [copies.get(p, p) for p in parameters]
    for found_inf in (0.0, 1.0):
        give_gradients(leaves, 0, 1.0, torch.float16)
        states = [value for optimizer in built for state in optimizer.state.values() for value in state.values()]
        before = [value.detach().clone() for value in (*parameters, *copies.values(), *states)]
        if found_inf:
            leaves[0].grad[0, 0], leaves[2].grad[0, 0] = float("inf"), float("nan")  # type: ignore[index]
        for optimizer in built:
            optimizer.found_inf = torch.tensor(found_inf, device=device)  # type: ignore[attr-defined]
            optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(before, (*parameters, *copies.values(), *states), strict=True)]
        assert all(same) if found_inf else not any(same)


def test_one_without_a_gradient_is_left_alone() -> None:
    parameters, copies = with_copies("cpu", torch.bfloat16)
    lr = torch.tensor(0.1)
    optimizer = CopiedAdamW(parameters[:3], copies, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    before = [p.detach().clone() for p in parameters]
    optimizer.step()  # none has one
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    copies[parameters[0]].grad = torch.ones_like(copies[parameters[0]])
    parameters[1].grad = torch.ones_like(parameters[1])  # its copy is what counts
    optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(parameters, before, strict=True)] == [False, True, True, True]
    assert [int(optimizer.state[p]["step"]) for p in parameters[:3]] == [1, 0, 0]


def test_its_state_goes_on_where_another_was_loaded() -> None:
    config = compose(["optimizer.lr=0.01", "data=synthetic"]).optimizer
    parameters, copies = with_copies("cpu", torch.bfloat16)
    first, _ = build_adamw(parameters, config, copies)
    for step in range(4):
        if step == 2:
            second, _ = build_adamw(parameters, config, copies)
            second.load_state_dict(first.state_dict())
            first = second
        give_gradients([copies.get(p, p) for p in parameters], step, 1.0, torch.bfloat16)
        first.step()
    whole, their_copies = with_copies("cpu", torch.bfloat16)
    undisturbed, _ = build_adamw(whole, config, their_copies)
    for step in range(4):
        give_gradients([their_copies.get(p, p) for p in whole], step, 1.0, torch.bfloat16)
        undisturbed.step()
    assert all(torch.equal(mine, other) for mine, other in zip(parameters, whole, strict=True))
