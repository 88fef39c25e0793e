"""How many parameters a model has and how much arithmetic a token costs, from the configuration alone."""

from __future__ import annotations

from llmmed.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """All trainable parameters; a tied table is one."""
    tables = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    norms = (2 * config.n_layers + 1) * config.d_model
    return tables + norms + matrix_parameter_count(config)


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of forward and backward for one token of a sequence of `seq_len` tokens.

    `6 N + 12 L H Q T` of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), with two differences. N holds only
    what enters a matrix product: the layers' projections and the output head, hence a tied table once and no norms. The
    attention term is halved, because under a causal mask a token attends to half of the sequence on average: with
    `H Q = d_model` it is `6 L d_model T`. Recomputed activations do not count: this is the model's arithmetic, from
    which MFU is computed, not the machine's.
    """
    head = config.vocab_size * config.d_model
    products = matrix_parameter_count(config) + head
    return 6 * products + 6 * config.n_layers * config.d_model * seq_len


def matrix_parameter_count(config: ModelConfig) -> int:
    """The parameters of the layers' matrices, which are all but tables and norms."""
    d_head = config.d_model // config.n_heads
    query_and_output = 2 * config.n_heads * d_head * config.d_model
    key_and_value = 2 * config.n_kv_heads * d_head * config.d_model
    feed_forward = 3 * config.d_model * config.d_ff
    return config.n_layers * (query_and_output + key_and_value + feed_forward)
