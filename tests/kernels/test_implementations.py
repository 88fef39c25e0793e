"""Every implementation of ours that can run here passes the gate, in every dtype that it claims.

Other people's may be judged wrong: then they are not used, and nothing here is broken. What they may not do is crash.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llmmed.autotune.verify import verify
from llmmed.kernels.base import Implementation, Unavailable
from llmmed.kernels.catalog import (
    COMPILED,
    DEFAULT,
    get_implementation,
    get_op,
    implementation_names,
    load_function,
    op_names,
)
from llmmed.training.execution import take_deterministic_kernels

ALL = [(op, name) for op in op_names() for name in implementation_names(op)]
THEIRS = ("liger", "torch_fused", "cudnn", "efficient", "flash", "flash_attention_2", "flash_attention_3", "flex")
# `test_planted_bugs.py` accepts the Triton kernels, in the interpreter and on a GPU.
PLAIN = [(op, name) for op, name in ALL if not name.startswith("triton")]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize(("op", "name"), [pair for pair in PLAIN if pair[1] != COMPILED])
def test_on_a_cpu(op: str, name: str, dtype: torch.dtype) -> None:
    assert_verified(op, name, dtype, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("op", ["rms_norm", "rotary", "newton_schulz"])  # compiling all takes minutes
def test_compiled_on_a_cpu(op: str) -> None:
    assert_verified(op, COMPILED, FLOAT32, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize(("op", "name"), PLAIN)
def test_on_a_gpu(op: str, name: str, dtype: torch.dtype) -> None:
    assert_verified(op, name, dtype, torch.device("cuda"))


@pytest.mark.parametrize("op", op_names())
def test_every_op_has_a_default_for_every_device_and_dtype(op: str) -> None:
    default = get_implementation(op, DEFAULT)
    assert set(default.devices) == {"cuda", "cpu"}
    assert set(default.dtypes) == {FLOAT32, BFLOAT16, FLOAT16}


def assert_verified(op: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    implementation, function = load(op, name, dtype, device)
    with deterministic_algorithms(implementation.deterministic):
        verdict = verify(
            get_op(op), implementation, function, [], device, dtype=dtype, deterministic=implementation.deterministic
        )
    allowed = ("verified", "wrong") if name in THEIRS else ("verified",)
    assert verdict.status in allowed, verdict
    assert verdict.checks > 1


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """As `train.deterministic=true` has it: PyTorch's attention is reproducible only when it is told to be."""
    if wanted:
        take_deterministic_kernels()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_mem_efficient_sdp(True)


def load(op: str, name: str, dtype: torch.dtype, device: torch.device) -> tuple[Implementation, Callable[..., Any]]:
    """Skips what cannot run here, with its reason."""
    try:
        implementation = get_implementation(op, name)
        reason = implementation.why_not(device, dtype)
        if reason is None:
            return implementation, load_function(op, implementation)
    except Unavailable as error:
        reason = str(error)
    pytest.skip(f"{op}, {name}: {reason}")
