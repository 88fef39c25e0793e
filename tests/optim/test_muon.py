"""Muon: the steps of `torch.optim.Muon`, fused parameters as the matrices they are, skipped and scaled steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from llmmed.kernels.catalog import get_implementation, implementation_names, load_function
from llmmed.kernels.newton_schulz.pytorch import newton_schulz
from llmmed.optim.muon import Muon, stack_shapes


def matrices(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(parameters: list[nn.Parameter], seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * factor).to(parameter.device)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_agrees_with_torch_step_for_step(adjust: str) -> None:
    ours = matrices((16, 16), (16, 48), (48, 16), (16, 16))
    theirs = copy.deepcopy(ours)
    muon = Muon(ours, newton_schulz, lr=0.02, weight_decay=0.1, momentum=0.9, adjust=adjust)  # type: ignore[arg-type]
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        before = [p.detach().clone() for p in theirs]
        muon.step()
        reference.step()
        for mine, other, old in zip(ours, theirs, before, strict=True):
            # Both iterate in bfloat16, whose rounding the iteration amplifies: compare the updates, not the weights.
            update, expected = mine - old, other - old
            assert (update - expected).norm() < 0.03 * (step + 1) * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", implementation_names("newton_schulz"))
def test_agrees_with_torch_step_for_step_on_a_gpu(name: str) -> None:
    function = load_function("newton_schulz", get_implementation("newton_schulz", name))
    shapes = ((256, 256), (256, 640), (640, 256), (96, 256), (33, 77), (77, 33))  # the last off whole 16 bytes
    ours, theirs = ([nn.Parameter(p.detach().cuda()) for p in matrices(*shapes)] for _ in range(2))
    muon = Muon(ours, function, lr=0.02, weight_decay=0.1, momentum=0.9, adjust="original")
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="original")
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        before = [p.detach().clone() for p in theirs]
        muon.step()
        reference.step()
        for mine, other, old in zip(ours, theirs, before, strict=True):
            update, expected = mine - old, other - old
            assert (update - expected).norm() < 0.03 * (step + 1) * expected.norm()


def test_a_fused_parameter_is_the_matrices_it_is_made_of() -> None:
    parts = matrices((16, 16), (8, 16), (8, 16))
    fused = nn.Parameter(torch.cat([p.detach() for p in parts]))
    by_part = Muon(parts, newton_schulz, lr=0.1)
    at_once = Muon([fused], newton_schulz, lr=0.1, splits={fused: (16, 8, 8)})
    set_gradients(parts, 1)
    fused.grad = torch.cat([p.grad for p in parts if p.grad is not None])
    by_part.step()
    at_once.step()
    assert torch.equal(fused, torch.cat(list(parts)))


def test_gradients_are_unscaled() -> None:
    plain, scaled = matrices((8, 24)), matrices((8, 24))
    set_gradients(plain, 3)
    set_gradients(scaled, 3, factor=1024.0)
    first, second = Muon(plain, newton_schulz), Muon(scaled, newton_schulz)
    second.grad_scale = torch.tensor(1024.0)
    first.step()
    second.step()
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(first.state[plain[0]]["momentum_buffer"], second.state[scaled[0]]["momentum_buffer"])


def test_copies_are_written_with_their_parameters_and_have_the_gradients() -> None:
    plain, copied = matrices((8, 24), (24, 24)), matrices((8, 24), (24, 24))
    copies = {p: p.detach().bfloat16().requires_grad_() for p in copied[:1]}
    leaves = [copies.get(p, p) for p in copied]
    set_gradients(plain, 3)
    for parameter, leaf in zip(plain, leaves, strict=True):
        leaf.grad = parameter.grad.to(leaf.dtype)  # type: ignore[union-attr]
        parameter.grad = leaf.grad.float()
    Muon(plain, newton_schulz).step()
    Muon(copied, newton_schulz, copies=copies).step()
    assert all(map(torch.equal, plain, copied))
    assert torch.equal(copies[copied[0]], copied[0].bfloat16())


def test_a_step_with_an_overflow_changes_nothing() -> None:
    parameters = matrices((8, 24), (24, 24))
    muon = Muon(parameters, newton_schulz)
    set_gradients(parameters, 0)
    muon.step()
    before = [p.detach().clone() for p in parameters]
    buffers: list[Tensor] = [muon.state[p]["momentum_buffer"].clone() for p in parameters]
    set_gradients(parameters, 1)
    assert parameters[0].grad is not None
    parameters[0].grad[0, 0] = float("inf")
    muon.found_inf = torch.ones(())
    muon.step()
    for parameter, old, buffer in zip(parameters, before, buffers, strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(muon.state[parameter]["momentum_buffer"], buffer)


def test_a_whole_model_takes_a_handful_of_calls() -> None:
    calls: list[tuple[int, ...]] = []

    def counting(stack: Tensor) -> Tensor:
        calls.append(tuple(stack.shape))
        return newton_schulz(stack)

    layers = 3
    parameters = matrices(*[(48, 16), (16, 16), (64, 16), (16, 32)] * layers)
    splits: dict[nn.Parameter, tuple[int, ...]] = dict.fromkeys(parameters[::4], (16, 16, 16))
    splits |= dict.fromkeys(parameters[2::4], (32, 32))
    muon = Muon(parameters, counting, splits=splits)
    set_gradients(parameters, 0)
    muon.step()
    assert calls == [(4 * layers, 16, 16), (3 * layers, 16, 32)]
    layout = tuple((tuple(p.shape), tuple(splits.get(p, (p.shape[0],)))) for p in parameters)
    assert stack_shapes(layout) == calls


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="takes matrices"):
        Muon([nn.Parameter(torch.ones(4))], newton_schulz)
