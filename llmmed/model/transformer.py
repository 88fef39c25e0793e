"""The Llama architecture (Touvron et al. 2023, arXiv:2302.13971) over a kernel table.

RMSNorm before each branch, rotary positions, SwiGLU, grouped-query attention. Parameters are float32 and have the same
names and shapes under every kernel plan; each is cast to the compute dtype where it is used, unless a copy is kept
(`keep_copies`), and the residual stream is in the compute dtype. There is no autocast: its rules differ between meta,
CPU and CUDA, and custom operators escape it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmmed.config import Config, ModelConfig, check_heads
from llmmed.errors import UserError
from llmmed.kernels.base import Kernels
from llmmed.model.precision import compute_dtype as dtype_of

IGNORE_INDEX = -100  # a target that does not count, as in `torch.nn.functional.cross_entropy`
_INIT_STD = 0.02
_PROJECTIONS = ("qkv_projection", "output_projection", "gate_up_projection", "down_projection")
_COPY = "_copy"  # behind the name of a projection's weight


class Transformer(nn.Module):
    """A causal language model.

    Args:
        config: The architecture.
        kernels: The table that the forward pass calls for everything but its matrix products.
        compute_dtype: The dtype of activations, and of weights inside matrix products.
        max_seq_len: The longest sequence that `forward` accepts, in tokens. It sizes the rotary tables and nothing
            else: a checkpoint loads into a model of any length.
        seed: Of the initial parameters, which are the same numbers on every device. None leaves them uninitialised, for
            whoever loads others at once: drawing a billion takes seconds.
        device: Where the parameters are created. On `meta` they stay without values.
        checkpoint_blocks: Keeps only what enters a block and computes the rest again in the backward pass (Chen et al.
            2016, arXiv:1604.06174): the same gradients with less memory, for a third more arithmetic.

    Raises:
        UserError: the heads do not fit the width.
    """

    cos: Tensor  # [max_seq_len, d_head / 2] float32
    sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        compute_dtype: torch.dtype,
        *,
        max_seq_len: int,
        seed: int | None = 0,
        device: torch.device | str = "cpu",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        check_heads(config)
        self.config = config
        self.kernels = kernels
        self.compute_dtype = compute_dtype
        self.checkpoint_blocks = checkpoint_blocks
        self.token_embedding = _parameter(config.vocab_size, config.d_model, device=device)
        self.layers = nn.ModuleList(Block(config, device) for _ in range(config.n_layers))
        self.final_norm = _parameter(config.d_model, device=device)
        self.lm_head = None if config.tie_embeddings else _parameter(config.vocab_size, config.d_model, device=device)
        cos, sin = rotary_tables(max_seq_len, config.d_model // config.n_heads, config.rope_theta)
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)
        self._embed, self._loss = _embed, _loss
        self.register_load_state_dict_post_hook(lambda model, _: model._refresh_copies())
        if seed is not None:
            self.initialize(seed)

    @classmethod
    def for_training(
        cls, config: Config, kernels: Kernels, device: torch.device | str, *, initialized: bool = True
    ) -> Transformer:
        """The model as a run trains it: its precision, sequence length, seed and activation checkpointing."""
        train = config.train
        return cls(
            config.model,
            kernels,
            dtype_of(train.precision),
            max_seq_len=train.seq_len,
            seed=config.seed if initialized else None,
            device=device,
            checkpoint_blocks=train.activation_checkpointing == "block",
        )

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draws all parameters anew: matrices from N(0, 0.02^2), those that write to the residual stream divided by
        sqrt(2 n_layers) (GPT-2, Radford et al. 2019, section 2.3), norms one. Drawn on the CPU, so that a seed means
        the same model everywhere."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            writes_residual = name.endswith(("output_projection", "down_projection"))
            std = _INIT_STD / math.sqrt(2 * self.config.n_layers) if writes_residual else _INIT_STD
            parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator))
        self._refresh_copies()

    @torch.no_grad()
    def keep_copies(self) -> None:
        """Lets the projections of all layers read copies of their weights in the compute dtype from now on.

        Gradients then arrive at the copies, as the products give them, instead of being cast to float32 at the
        parameters: for one micro-batch the same values, in half of the memory. Whoever changes a projection's weight
        writes its copy, as our optimizers do; `initialize` and `load_state_dict` see to it themselves. In float32 there
        is nothing to copy.
        """
        if self.compute_dtype == torch.float32:
            return
        for layer in self.layers:
            for name in _PROJECTIONS:
                copy = layer.get_parameter(name).to(self.compute_dtype).requires_grad_()
                layer.register_buffer(name + _COPY, copy, persistent=False)

    @property
    def copies(self) -> dict[nn.Parameter, Tensor]:
        """The parameters of which there are copies, and these."""
        found = {}
        for layer in self.layers:
            for name in _PROJECTIONS:
                copy: Tensor | None = getattr(layer, name + _COPY)
                if copy is not None:
                    found[layer.get_parameter(name)] = copy
        return found

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients arrive at: for each parameter, in their order, its copy or itself."""
        copies = self.copies
        return [copies.get(parameter, parameter) for parameter in self.parameters()]

    @torch.no_grad()
    def _refresh_copies(self) -> None:
        for parameter, copy in self.copies.items():
            copy.copy_(parameter)

    def set_kernels(self, kernels: Kernels) -> None:
        """Takes another plan from the next call on. Parameters stay what they are; a compiled model compiles again."""
        self.kernels = kernels

    def compile_parts(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compiles embedding, block and loss by themselves, each as one graph with static shapes.

        All blocks are the same code and share their compiled form, so that the time to compile does not grow with the
        depth; a model of another depth takes it over, too. What a compiler fuses lies within a block: what passes from
        one to the next is two tensors that are in memory anyway.
        """

        def compiled(part: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(part, fullgraph=True, dynamic=False, backend=backend)

        self._embed, self._loss = compiled(_embed), compiled(_loss)
        for layer in self.layers:
            layer.compile(fullgraph=True, dynamic=False, backend=backend)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Logits, or the loss if targets are given.

        Args:
            tokens: [batch, seq] int64.
            targets: [batch, seq] int64, the token that follows each of `tokens`, or `IGNORE_INDEX`.
            scale: A 0-d float32 tensor that the loss is multiplied by before anything is rounded; None for one.

        Returns:
            Without targets, the logits [batch, seq, vocab] in the compute dtype. With targets, the mean cross-entropy
            over those not ignored, in nats, times `scale`, a 0-d float32 tensor; zero if all are ignored.

        Raises:
            UserError: the sequence is longer than `max_seq_len`.
        """
        hidden_states = self.hidden_states(tokens)
        if targets is None:
            return F.linear(hidden_states, self.head.to(self.compute_dtype))
        return self.loss(hidden_states, targets, scale)

    @property
    def head(self) -> Tensor:
        """The output table [vocab, d_model] float32: the embedding's where they are tied."""
        return self.token_embedding if self.lm_head is None else self.lm_head

    def loss(self, hidden_states: Tensor, targets: Tensor, scale: Tensor | None = None) -> Tensor:
        """The loss as `forward` gives it, from what `hidden_states` gives."""
        return self._loss(self.kernels, hidden_states, self.head, targets, scale)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """What the head takes, [batch, seq, d_model] in the compute dtype, of tokens [batch, seq]."""
        seq_len = tokens.shape[1]
        if seq_len > self.cos.shape[0]:
            raise UserError(
                f"a sequence of {seq_len} tokens does not fit a model built for {self.cos.shape[0]}; "
                f"shorten it or build the model with max_seq_len={seq_len}"
            )
        cos, sin = self.cos[:seq_len], self.sin[:seq_len]
        norms = self.norms
        normed, residual = self._embed(
            self.kernels, tokens, self.token_embedding, norms[0], self.config.norm_eps, self.compute_dtype
        )
        for layer, next_norm in zip(self.layers, norms[1:], strict=True):
            normed, residual = self._run_block(layer, normed, residual, next_norm, cos, sin)
        return normed

    @property
    def norms(self) -> list[nn.Parameter]:
        """The weights of the norms that stand at the beginning of each layer, and of the final one."""
        return [layer.get_parameter("attention_norm") for layer in self.layers] + [self.final_norm]

    def _run_block(
        self, block: nn.Module, normed: Tensor, residual: Tensor, next_norm: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = (normed, residual, next_norm, cos, sin, self.kernels)
        if self.checkpoint_blocks and torch.is_grad_enabled():
            # Nothing in a block is random, and saving random states would wait for the device and break graph capture.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return block(*inputs)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each behind a norm and added to the residual stream.

    It ends where the next norm does, the next layer's first or the final one: adding a branch to the stream and
    normalising the sum can then be one kernel, and all layers are the same code.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        super().__init__()
        d_model, self.d_head = config.d_model, config.d_model // config.n_heads
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)  # of queries, keys, values
        self.eps = config.norm_eps
        self.attention_norm = _parameter(d_model, device=device)
        self.qkv_projection = _parameter(sum(self.heads) * self.d_head, d_model, device=device)
        self.output_projection = _parameter(d_model, config.n_heads * self.d_head, device=device)
        self.mlp_norm = _parameter(d_model, device=device)
        self.gate_up_projection = _parameter(2 * config.d_ff, d_model, device=device)
        self.down_projection = _parameter(d_model, config.d_ff, device=device)
        for name in _PROJECTIONS:
            self.register_buffer(name + _COPY, None, persistent=False)

    def forward(
        self, normed: Tensor, residual: Tensor, next_norm: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns the normed residual stream and the stream itself.

        Both are [batch, seq, d_model] in the compute dtype: what comes in is normed by this layer's `attention_norm`,
        what goes out by `next_norm` [d_model].
        """
        update = self._attention(normed, cos, sin, kernels)
        normed, residual = kernels.add_rms_norm(update, residual, self.mlp_norm, self.eps)
        return kernels.add_rms_norm(self._feed_forward(normed, kernels), residual, next_norm, self.eps)  # type: ignore[no-any-return]

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels) -> Tensor:
        qkv = F.linear(x, self._weight("qkv_projection", x.dtype)).view(*x.shape[:2], -1, self.d_head)
        attended = kernels.rotary_attention(qkv, cos, sin, self.heads[0])  # [batch, seq, n_heads, d_head]
        return F.linear(attended.flatten(2), self._weight("output_projection", x.dtype))

    def _feed_forward(self, x: Tensor, kernels: Kernels) -> Tensor:
        gate_up, down = (self._weight(name, x.dtype) for name in ("gate_up_projection", "down_projection"))
        return kernels.swiglu_mlp(x, gate_up, down)  # type: ignore[no-any-return]

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        copy: Tensor | None = getattr(self, name + _COPY)
        return getattr(self, name).to(dtype) if copy is None else copy  # type: ignore[no-any-return]


def rotary_tables(seq_len: int, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `position * theta^(-2 i / d_head)`, each [seq_len, d_head / 2] float32 on the CPU.

    RoFormer (Su et al. 2021, arXiv:2104.09864), equation 15. In float64 before rounding: at position 100,000 a float32
    angle is off by up to 0.004.
    """
    exponents = torch.arange(0, d_head, 2, dtype=torch.float64, device="cpu") / d_head
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64, device="cpu"), theta**-exponents)
    return angles.cos().float(), angles.sin().float()


def _embed(
    kernels: Kernels, tokens: Tensor, table: Tensor, norm: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The residual stream at its beginning, [batch, seq, d_model] in the compute dtype: normed, and itself."""
    residual = F.embedding(tokens, table).to(dtype)
    return kernels.rms_norm(residual, norm, eps), residual


def _loss(kernels: Kernels, hidden_states: Tensor, head: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    rows, wanted = hidden_states.flatten(0, 1), targets.flatten()
    loss: Tensor = kernels.linear_cross_entropy(rows, head, wanted, IGNORE_INDEX, scale)
    return loss


def _parameter(*shape: int, device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
