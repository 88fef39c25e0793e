"""The configuration: one dataclass a YAML group. No field has a default: every default is visible in `configs/`.

Nothing here imports torch: a mistake in the configuration is told within a second.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from llmmed.errors import UserError

_STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]  # an empty one is a shell variable that is not set
Place = Annotated[Text, AfterValidator(os.path.expanduser)]  # a path, or a name on the Hub


@dataclass(config=_STRICT, frozen=True)
class ModelConfig:
    """A Llama-architecture transformer."""

    name: str
    n_layers: Positive
    d_model: Positive
    n_heads: Positive
    n_kv_heads: Positive
    d_ff: Positive
    vocab_size: Positive
    rope_theta: PositiveFloat
    norm_eps: PositiveFloat
    tie_embeddings: bool
    init_from: Place | None  # a Hugging Face Llama (folder or hub name), or a run or checkpoint of ours


@dataclass(config=_STRICT, frozen=True)
class KernelsConfig:
    """How the implementation of each op is picked."""

    policy: Literal["auto", "triton", "pytorch"]
    pin: dict[str, str | None]
    on_unavailable: Literal["error", "fallback"]
    margin: Fraction  # a rival must be faster than the default by this share, and by more than the noise
    cache: Literal["use", "refresh", "none"]
    plan: Place | None  # somebody's kernels.json, verified again here
    objective: Literal["time", "memory"]  # what the step is to take least of
    memory_budget_gib: PositiveFloat | None  # a plan that needs more is out; null: what the GPU has
    budget_seconds: PositiveFloat  # tuning ends after this with the best plan so far
    candidate_seconds: PositiveFloat  # one candidate that takes longer is killed and rejected


@dataclass(config=_STRICT, frozen=True)
class TrainConfig:
    """The training loop. Lengths in tokens, batches in sequences."""

    max_steps: Positive
    seq_len: Annotated[int, Field(ge=2)]
    micro_batch_size: Positive
    global_batch_tokens: Positive
    precision: Literal["fp32", "bf16", "fp16"]
    compile: Literal["auto", "eager", "compiled", "graphs"]
    activation_checkpointing: Literal["none", "block"]
    grad_clip: NonNegativeFloat  # 0 switches clipping off
    eval_every: NonNegative  # 0: only at the end
    eval_tokens: Positive  # in windows of seq_len, one at least; all there are where there are fewer
    checkpoint_every: NonNegative  # 0: only at the end
    keep_last: Positive
    keep_best: bool  # besides those, the one with the best validation loss
    patience: NonNegative  # evaluations without a better validation loss that end the run; 0: it is never ended
    log_every: Positive
    max_skipped_steps: Positive  # in a row, for a loss or gradients that are not finite; then the run ends
    sample_every: NonNegative  # 0: never
    sample_prompts: Annotated[list[str], Field(min_length=1)]
    sample_tokens: Positive  # the longest continuation
    resume: Text | None  # null, auto, latest, or a run folder
    deterministic: bool
    dry_run: bool
    profile_steps: NonNegative  # 0: none


@dataclass(config=_STRICT, frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule. Muon updates the layers' matrices, AdamW everything else."""

    name: Literal["adamw", "muon"]
    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    betas: tuple[Fraction, Fraction]  # AdamW's
    eps: Annotated[float, Field(ge=1.18e-38)]  # AdamW's; float32 has no smaller normal number
    momentum: Fraction | None  # Muon's
    schedule: Literal["cosine", "linear", "constant", "wsd"]
    decay_ratio: Annotated[float, Field(gt=0, le=1)]  # wsd's
    warmup_steps: NonNegative
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)]


@dataclass(config=_STRICT, frozen=True)
class DataConfig:
    """Where documents come from."""

    name: Literal["biomed", "text", "synthetic", "hub", "mixture"]
    path: Place | None  # text: a file or a folder of .txt, .jsonl, .parquet; hub: a dataset's name, or a folder
    text_field: Text  # jsonl, parquet, hub: the field with the text
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    max_documents: Positive | None  # take the first so many; null: all
    subset: Text | None  # hub: the dataset's configuration
    split: Text  # hub
    revision: Text | None  # hub: a branch, tag or commit; null: the newest when it is first prepared
    streaming: bool  # hub: read over the network as it is needed instead of downloading all files first
    retries: NonNegative  # hub: attempts after a network error, each after twice the pause of the one before
    sources: dict[str, DataConfig]  # mixture
    weights: dict[str, PositiveFloat]  # mixture: each source's share of the training windows, in any unit


@dataclass(config=_STRICT, frozen=True)
class TokenizerConfig:
    """How documents become tokens."""

    name: Literal["bpe", "hub"]
    path: Place | None  # hub: a repository's name, or a folder with its tokenizer.json
    vocab_size: Annotated[int, Field(ge=258)]
    training_bytes: Positive | None  # bpe: it is trained on about so much text, taken evenly from all of it


@dataclass(config=_STRICT, frozen=True)
class LoggerConfig:
    """Weights & Biases: a sink, never the source."""

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    timeout_seconds: PositiveFloat  # to start, and to finish; after it the run goes on, or ends, without


@dataclass(config=_STRICT, frozen=True)
class Config:
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: Literal["cuda", "cpu"]
    model: ModelConfig
    kernels: KernelsConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    logger: LoggerConfig


def check_heads(model: ModelConfig) -> None:
    """Raises `UserError` if the heads do not fit the width, or each other."""
    if model.d_model % (2 * model.n_heads):
        width = 2 * model.n_heads * max(1, round(model.d_model / (2 * model.n_heads)))
        fitting = [n for n in range(1, model.d_model // 2 + 1) if model.d_model % (2 * n) == 0]
        heads = min(fitting, key=lambda n: abs(n - model.n_heads), default=None)
        raise UserError(
            f"model.d_model={model.d_model} does not divide into model.n_heads={model.n_heads} heads of an even size; "
            f"try {'' if heads is None else f'model.n_heads={heads} or '}model.d_model={width}"
        )
    if model.n_heads % model.n_kv_heads:
        divisors = [n for n in range(1, model.n_heads + 1) if model.n_heads % n == 0]
        raise UserError(
            f"model.n_kv_heads={model.n_kv_heads} does not divide model.n_heads={model.n_heads}; "
            f"allowed: {', '.join(map(str, divisors))}"
        )
