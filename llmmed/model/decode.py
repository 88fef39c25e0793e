"""Decoding with a cache of keys and values: each new token costs one pass over one position."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llmmed.kernels.base import Kernels
from llmmed.model.transformer import Block, Transformer

_COLD = 1e-4  # below, another token than the likeliest is only drawn where both are as likely, and logits overflow


class Decoder:
    """Logits of the next token, and the state to go on from. For one sequence or several of one length.

    Args:
        model: In no mode of its own; its parameters are used as they are.
        kernels: Another table than the model's.
    """

    def __init__(self, model: Transformer, kernels: Kernels | None = None) -> None:
        self._model, self._kernels = model, kernels or model.kernels
        self._cache: list[tuple[Tensor, Tensor]] = []  # per layer, keys and values [batch, seen, n_kv_heads, d_head]
        self.seen = 0

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> Tensor:
        """Takes further tokens [batch, n] int64; returns the logits of what follows them, [batch, vocab] float32.

        Raises `ValueError` past the length that the model's rotary tables have.
        """
        model, end = self._model, self.seen + tokens.shape[1]
        if end > model.cos.shape[0]:
            raise ValueError(f"{end} tokens are more than the {model.cos.shape[0]} that the model was built for")
        cos, sin = model.cos[self.seen : end], model.sin[self.seen : end]
        kernels, dtype, eps = self._kernels, model.compute_dtype, model.config.norm_eps
        norms = model.norms
        residual = F.embedding(tokens, model.token_embedding).to(dtype)
        normed = kernels.rms_norm(residual, norms[0], eps)
        for index, (layer, next_norm) in enumerate(zip(model.layers, norms[1:], strict=True)):
            assert isinstance(layer, Block)
            qkv = F.linear(normed, layer.qkv_projection.to(dtype)).view(*normed.shape[:2], -1, layer.d_head)
            q, k, v = qkv.split(layer.heads, dim=2)
            q, k = kernels.rotary(q, k, cos, sin)
            update = F.linear(self._attend(index, q, k, v).flatten(2), layer.output_projection.to(dtype))
            normed, residual = kernels.add_rms_norm(update, residual, layer.mlp_norm, eps)
            update = kernels.swiglu_mlp(normed, layer.gate_up_projection.to(dtype), layer.down_projection.to(dtype))
            normed, residual = kernels.add_rms_norm(update, residual, next_norm, eps)
        self.seen = end
        return F.linear(normed[:, -1], model.head.to(dtype)).float()

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.seen:
            before_k, before_v = self._cache[index]
            k, v = torch.cat((before_k, k), dim=1), torch.cat((before_v, v), dim=1)
            self._cache[index] = (k, v)
        else:
            self._cache.append((k, v))
        n, length = q.shape[1], k.shape[1]
        visible = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped).transpose(1, 2)


def sample(
    model: Transformer,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    end: int,
    kernels: Kernels | None = None,
) -> Iterator[int]:
    """Token after token, until `end` or `max_tokens`; `kernels` is a table to use in place of the model's.

    Temperature 0 takes the likeliest; otherwise the nucleus of `top_p` (Holtzman et al. 2020, arXiv:1904.09751). Raises
    `FloatingPointError` if the logits are not finite.
    """
    decoder = Decoder(model, kernels)
    generator = torch.Generator().manual_seed(seed)
    logits = decoder.advance(torch.tensor([prompt], device=model.cos.device))
    for produced in range(1, max_tokens + 1):
        token = _pick(logits[0].cpu(), temperature, top_p, generator)
        if token == end:
            return
        yield token
        if produced < max_tokens:
            logits = decoder.advance(torch.tensor([[token]], device=model.cos.device))


def _pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if not logits.isfinite().all():
        raise FloatingPointError("the logits are not finite")
    if temperature < _COLD:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
    probabilities[1:][(probabilities.cumsum(-1) - probabilities)[1:] >= top_p] = 0.0  # the first always stays
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
