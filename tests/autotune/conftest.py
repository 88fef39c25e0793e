"""What the tests of the autotuner share: a tiny run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmmed.autotune.journal import Job
from llmmed.autotune.workload import Workload
from llmmed.compose import compose
from llmmed.config import Config
from llmmed.kernels.base import Call, tensor_spec


@pytest.fixture(scope="session")
def tiny() -> Config:
    """A run of two small layers, kernels=auto, eager."""
    return compose(
        [
            "experiment=smoke",
            "data=synthetic",
            "device=cpu",
            "model.n_kv_heads=2",
            "model.d_ff=96",
            "model.vocab_size=101",
            "model.norm_eps=1e-5",
            "model.tie_embeddings=true",
            "train.seq_len=16",
            "train.micro_batch_size=2",
            "train.compile=eager",
            "kernels.cache=none",
            "kernels.budget_seconds=240",
            "kernels.candidate_seconds=60",
        ]
    )


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """A job for a minute on the CPU, in eager mode, with nothing to do; what is given changes that."""

    def make(**given: object) -> Job:
        values: dict[str, object] = {
            "journal": tmp_path / "journal.jsonl",
            "device": "cpu",
            "mode": "eager",
            "deterministic": False,
            "matmul_precision": "highest",
            "tasks": [],
            "seconds": 60.0,
        }
        return Job.model_validate(values | given)

    return make


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
