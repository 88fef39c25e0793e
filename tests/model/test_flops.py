"""Parameters and arithmetic, against the built models and against a count of what a step computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmmed.config import ModelConfig
from llmmed.kernels.base import Kernels
from llmmed.model import Transformer, flops_per_token, parameter_count

SIZES = {  # layers, width, heads, ff, millions of parameters with a tied vocabulary of 49,152
    "tiny": (2, 64, 4, 192, 3),
    "small": (6, 384, 8, 1536, 33),
    "base": (12, 768, 12, 2048, 123),
    "medium": (24, 1024, 16, 2816, 359),
    "large": (16, 2048, 16, 5632, 923),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_the_count_is_that_of_the_built_model(kernels: Kernels, size: str, tied: bool) -> None:
    layers, width, heads, ff, millions = SIZES[size]
    config = ModelConfig(
        name=size,
        n_layers=layers,
        d_model=width,
        n_heads=heads,
        n_kv_heads=heads // 4 if size == "base" else heads,
        d_ff=ff,
        vocab_size=49_152,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=tied,
        init_from=None,
    )
    model = Transformer(config, kernels, torch.bfloat16, max_seq_len=64, device="meta")
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    if tied:
        full = parameter_count(replace(config, n_kv_heads=heads))
        assert round(full / 1e6) == millions


@pytest.mark.parametrize("tied", [True, False])
def test_the_arithmetic_is_that_of_a_step(tiny: ModelConfig, kernels: Kernels, tied: bool) -> None:
    config, batch, seq_len = replace(tiny, tie_embeddings=tied), 2, 32
    model = Transformer(config, kernels, torch.float32, max_seq_len=seq_len)
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens, tokens).backward()
    # the counter takes the whole square of attention, of which a causal mask needs half
    causal = 6 * config.n_layers * config.d_model * seq_len
    assert flops_per_token(config, seq_len) + causal == counter.get_total_flops() / (batch * seq_len)
