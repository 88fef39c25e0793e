"""Our AdamW is PyTorch's, with its state in memory from the start."""

from __future__ import annotations

import torch

from llmmed.compose import compose
from llmmed.optim.adamw import build_adamw, decay_groups


def test_the_moments_exist_before_the_first_step_and_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 4), (4,))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    config = compose(["optimizer.lr=0.01", "optimizer.weight_decay=0.1", "data=synthetic"]).optimizer
    built = build_adamw(ours, config)
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
