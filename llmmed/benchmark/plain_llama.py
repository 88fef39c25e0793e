"""A Llama as a good PyTorch user would write it by hand: the rival of a training step. It shares no code with ours.

Parameters are float32 and the step runs under autocast; the residual stream is in autocast's dtype, projections that
share an input are one matrix, and attention, norm and loss are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmmed.config import ModelConfig

Loss = Callable[[nn.Linear, Tensor, Tensor], Tensor]
"""`(head, x [tokens, width], targets [tokens]) -> mean cross-entropy`."""


class PlainLlama(nn.Module):
    """`(tokens, targets) [batch, seq] -> mean cross-entropy` in nats."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, seq_len: int, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        d_head = config.d_model // config.n_heads
        frequencies = config.rope_theta ** (-torch.arange(0, d_head, 2).float() / d_head)
        angles = torch.outer(torch.arange(seq_len).float(), frequencies)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)  # [seq, 1, d_head / 2]
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.loss(self.head, self.norm(x).flatten(0, 1), targets.flatten())


def plain_loss(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """The logits, then PyTorch's cross-entropy in float32."""
    return F.cross_entropy(head(x).float(), targets)


def torch_loss(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own fused form, which is newer than the oldest torch that this package runs on."""
    loss: Tensor = F.linear_cross_entropy(x, head.weight, targets)
    return loss


def _liger_loss(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused form. It sums the weight's gradient in float32, as everybody else does."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    bias = class_weights = softcap = None
    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
        x, head.weight.to(x.dtype), targets, bias, class_weights, -100, 0.0, 0.0, "mean", softcap, False, torch.float32
    )[0]
    return loss


liger_loss: Loss = torch.compiler.disable(_liger_loss)  # it reads a number from the device, which breaks a graph


class Block(nn.Module):
    """Attention and feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_head = config.d_model // config.n_heads
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.qkv = nn.Linear(config.d_model, sum(self.heads) * self.d_head, bias=False)
        self.output = nn.Linear(config.n_heads * self.d_head, config.d_model, bias=False)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.d_head))
        q, k, v = qkv.split(self.heads, dim=2)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        grouped = self.heads[0] != self.heads[1]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        out: Tensor = x + self.down(gated(gate, up))
        return out


class RMSNorm(nn.Module):
    """Over the last dimension, with a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions over [batch, seq, heads, d_head]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's activation."""
    return F.silu(gate) * up


_NAMES = {
    "attention_norm": "attention_norm",
    "qkv_projection": "qkv",
    "output_projection": "output",
    "mlp_norm": "mlp_norm",
    "gate_up_projection": "gate_up",
    "down_projection": "down",
}
_TABLES = {"token_embedding": "embedding", "final_norm": "norm", "lm_head": "head"}


def plain_state_dict(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of `llmmed.model.Transformer` under this model's names."""
    found = {}
    for name, tensor in ours.items():
        if name in _TABLES:
            found[f"{_TABLES[name]}.weight"] = tensor
        else:
            _, layer, parameter = name.split(".")
            found[f"blocks.{layer}.{_NAMES[parameter]}.weight"] = tensor
    if "lm_head" not in ours:
        found["head.weight"] = ours["token_embedding"]
    return found
