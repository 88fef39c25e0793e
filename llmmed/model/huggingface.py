"""To and from Hugging Face's `LlamaForCausalLM`: the same weights under the stock names, and the configuration.

Here q, k, v and gate, up are stacked row-wise in one matrix each; there they are matrices of their own. Rotary pairs
the two halves of a head on both sides, so no row changes place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmmed.config import ModelConfig
from llmmed.errors import UserError

_TABLES = {"token_embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
_HEAD = ("lm_head", "lm_head.weight")
_LAYER = {  # parameter of a layer -> the stock names of its row blocks
    "attention_norm": ("input_layernorm",),
    "qkv_projection": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output_projection": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up_projection": ("mlp.gate_proj", "mlp.up_proj"),
    "down_projection": ("mlp.down_proj",),
}
_FIELDS = {  # ours -> LlamaConfig's
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_COMPUTED = "rotary_emb.inv_freq"  # a buffer that old checkpoints hold


def to_hf_state_dict(weights: nn.Module | Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The parameters under Hugging Face's names.

    Args:
        weights: A `Transformer` or its state dict.
        config: Its architecture.

    Returns:
        Detached views, no copies. A tied head is left out, as in the files that Hugging Face writes.

    Raises:
        UserError: names or shapes are not those of the configuration.
    """
    source = weights.state_dict() if isinstance(weights, nn.Module) else weights
    rows = _rows(config)
    _check(source, {ours: _stacked(rows[stock]) for ours, stock in _names(config).items()}, "the model")
    state: dict[str, Tensor] = {}
    for ours, stock in _names(config).items():
        blocks = source[ours].detach().split([shape[0] for shape in rows[stock]])
        state.update(zip(stock, blocks, strict=True))
    return state


def from_hf_state_dict(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The parameters under the names of `Transformer`, float32, from a state dict of `LlamaForCausalLM`.

    Raises:
        UserError: names or shapes are not those of the configuration, or a head that is said to be tied has values of
            its own.
    """
    rows = _rows(config)
    expected = {name: shape for stock, shapes in rows.items() for name, shape in zip(stock, shapes, strict=True)}
    given = {name: tensor for name, tensor in state.items() if not name.endswith(_COMPUTED)}
    head = given.pop(_HEAD[1], None) if config.tie_embeddings else None
    _check(given, expected, "the Hugging Face checkpoint")
    if head is not None and not torch.equal(head, given[_TABLES["token_embedding"]]):
        raise UserError(
            "the Hugging Face checkpoint has an lm_head.weight that differs from its embedding table; "
            "set model.tie_embeddings=false"
        )
    return {ours: torch.cat([given[name].float() for name in stock]) for ours, stock in _names(config).items()}


def hf_config_dict(config: ModelConfig, *, max_seq_len: int, **extra: Any) -> dict[str, Any]:
    """The content of `config.json` for `LlamaForCausalLM`, readable by transformers 4 and 5.

    Args:
        config: The architecture.
        max_seq_len: The longest sequence, in tokens, that the model has seen.
        **extra: Further fields as they are, such as `bos_token_id`, `eos_token_id`, `dtype`.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "head_dim": config.d_model // config.n_heads,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "max_position_embeddings": max_seq_len,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        **extra,
    }


def from_hf_config_dict(data: Mapping[str, Any], *, name: str) -> ModelConfig:
    """The architecture behind a `config.json`, under the given name.

    Raises:
        UserError: it is not a Llama, lacks a field, or needs what `Transformer` has not (scaled rotary, biases).
    """
    if not isinstance(data, Mapping):
        raise UserError("the Hugging Face config.json is no JSON object; is it that of a Llama model?")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    fields = {
        "num_key_value_heads": data.get("num_attention_heads"),
        "tie_word_embeddings": False,
        "rope_theta": rope.get("rope_theta", 10_000.0),
        **{key: value for key, value in data.items() if value is not None},
    }
    missing = sorted(set(_FIELDS.values()) - fields.keys())
    if missing:
        raise UserError(f"the Hugging Face config.json lacks {', '.join(missing)}; is it that of a Llama model?")
    for key in ("hidden_size", "num_attention_heads"):
        if type(fields[key]) is not int or fields[key] < 1:
            raise UserError(f"the Hugging Face config.json has {key}={fields[key]!r}; it is an integer above 0")
    d_head = fields["hidden_size"] // fields["num_attention_heads"]
    supported = {
        "model_type": (data.get("model_type"), "llama"),
        "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "head_dim": (fields.get("head_dim", d_head), d_head),
        "attention_bias": (fields.get("attention_bias", False), False),
        "mlp_bias": (fields.get("mlp_bias", False), False),
    }
    for key, (found, allowed) in supported.items():
        if found != allowed:
            raise UserError(f"the Hugging Face config.json has {key}={found!r}; only {allowed!r} is supported")
    ours = {mine: fields[theirs] for mine, theirs in _FIELDS.items()}
    return ModelConfig(name=name, rope_theta=float(fields["rope_theta"]), init_from=None, **ours)


def _names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Every parameter's name here and, in the order of its rows, the stock names."""
    names: dict[str, tuple[str, ...]] = {ours: (stock,) for ours, stock in _TABLES.items()}
    if not config.tie_embeddings:
        names[_HEAD[0]] = (_HEAD[1],)
    for layer in range(config.n_layers):
        for ours, blocks in _LAYER.items():
            names[f"layers.{layer}.{ours}"] = tuple(f"model.layers.{layer}.{block}.weight" for block in blocks)
    return names


def _rows(config: ModelConfig) -> dict[tuple[str, ...], list[tuple[int, ...]]]:
    """The shapes of the stock tensors, under the tuple of their names."""
    width, d_head = config.d_model, config.d_model // config.n_heads
    queries, keys = config.n_heads * d_head, config.n_kv_heads * d_head
    shapes: dict[str, list[tuple[int, ...]]] = {
        "token_embedding": [(config.vocab_size, width)],
        "lm_head": [(config.vocab_size, width)],
        "final_norm": [(width,)],
        "attention_norm": [(width,)],
        "qkv_projection": [(queries, width), (keys, width), (keys, width)],
        "output_projection": [(width, queries)],
        "mlp_norm": [(width,)],
        "gate_up_projection": [(config.d_ff, width), (config.d_ff, width)],
        "down_projection": [(width, config.d_ff)],
    }
    return {stock: shapes[ours.rpartition(".")[2]] for ours, stock in _names(config).items()}


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _check(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], owner: str) -> None:
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        parts = [("lacks", missing), ("has besides", unexpected)]
        told = "; ".join(f"{verb} {', '.join(n[:3])}{' ...' if n[3:] else ''}" for verb, n in parts if n)
        raise UserError(
            f"{owner} does not fit the configuration: it {told}; check n_layers and tie_embeddings of model"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise UserError(
                f"{owner} does not fit the configuration: {name} is {tuple(state[name].shape)}, expected {shape}; "
                "check the sizes of model"
            )
