"""What the tests of the autotuner share: a tiny run on the CPU."""

from __future__ import annotations

import pytest
import torch

from llmmed.autotune.workload import Workload
from llmmed.config import (
    Config,
    DataConfig,
    KernelsConfig,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from llmmed.kernels.base import Call, tensor_spec


@pytest.fixture
def tiny() -> Config:
    """A run of two small layers, kernels=auto, eager."""
    return Config(
        seed=0,
        device="cpu",
        model=ModelConfig(
            name="tiny",
            n_layers=2,
            d_model=64,
            n_heads=4,
            n_kv_heads=2,
            d_ff=96,
            vocab_size=101,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            tie_embeddings=True,
        ),
        kernels=KernelsConfig(
            policy="auto",
            pin={},
            on_unavailable="error",
            margin=0.01,
            cache="none",
            plan=None,
            budget_seconds=240.0,
            candidate_seconds=60.0,
        ),
        train=TrainConfig(
            max_steps=1,
            seq_len=16,
            micro_batch_size=2,
            global_batch_tokens=32,
            precision="fp32",
            compile="eager",
            grad_clip=1.0,
            eval_every=0,
            eval_batches=1,
            checkpoint_every=0,
            keep_last=1,
            log_every=1,
            resume=None,
            deterministic=False,
            dry_run=False,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            lr=1e-3,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            eps=1e-8,
            schedule="cosine",
            warmup_steps=0,
            min_lr_ratio=0.1,
        ),
        data=DataConfig(name="synthetic", path=None, text_field="text", validation_fraction=0.1),
        tokenizer=TokenizerConfig(name="bpe", vocab_size=512),
        logger=LoggerConfig(mode="disabled", project="llmmed", entity=None, group=None, tags=[]),
    )


@pytest.fixture
def norms() -> Workload:
    """Five calls of `rms_norm` and nothing else, so that a tuning run is short."""
    call = Call.of(
        "rms_norm",
        x=tensor_spec(2, 16, 64, dtype=torch.float32, requires_grad=True),
        weight=tensor_spec(64, dtype=torch.float32, requires_grad=True),
        eps=1e-5,
    )
    return Workload({call: 5})
