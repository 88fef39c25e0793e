"""Which parameters which optimizer updates: Muon the hidden matrices if it is chosen, AdamW everything else."""

from __future__ import annotations

import torch
from torch import nn

from llmmed.config import ModelConfig, OptimizerConfig
from llmmed.model import Transformer, parameter_count
from llmmed.model.flops import matrix_parameter_count
from llmmed.optim.adamw import build_adamw
from llmmed.optim.muon import Muon


def build_optimizers(model: Transformer, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Every parameter belongs to exactly one of them. All read their rate from 0-d tensors, and keep the copies up to
    date that the model has now."""
    if config.name == "adamw":
        return build_adamw(model.parameters(), config, model.copies)
    hidden = _hidden_matrices(model)
    rest = [p for name, p in model.named_parameters() if name not in hidden]
    return [build_muon(model, config), *build_adamw(rest, config, model.copies)]


def state_elements(model: ModelConfig, config: OptimizerConfig) -> int:
    """How many float32 values the optimizers keep: AdamW two for each parameter, Muon one for each of its own."""
    muons = 0 if config.name == "adamw" else matrix_parameter_count(model)
    return 2 * parameter_count(model) - muons


def build_muon(model: Transformer, config: OptimizerConfig) -> Muon:
    """Muon over the layers' matrices. A fused projection is the matrices that it is made of."""
    hidden, sizes = _hidden_matrices(model), model.config
    d_head = sizes.d_model // sizes.n_heads
    rows = {
        "qkv_projection": tuple(heads * d_head for heads in (sizes.n_heads, sizes.n_kv_heads, sizes.n_kv_heads)),
        "gate_up_projection": (sizes.d_ff, sizes.d_ff),
    }
    assert config.momentum is not None
    device = next(iter(hidden.values())).device
    return Muon(
        hidden.values(),
        model.kernels.newton_schulz,
        lr=torch.tensor(config.lr, dtype=torch.float32, device=device),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        splits={p: rows[last] for name, p in hidden.items() if (last := name.rpartition(".")[2]) in rows},
        copies=model.copies,
    )


def _hidden_matrices(model: Transformer) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2}
