"""A GPU that no longer works is noticed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llmmed.autotune.gpu_state import damage_of

BROKEN_CAPTURE = """
import torch
from llmmed.autotune.gpu_state import damage_of

device = torch.device("cuda")
x = torch.ones(8, device=device)
assert damage_of(device) is None
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        x.sum().item()
except Exception as error:
    print("raised", type(error).__name__)
print("damage:", damage_of(device))
"""


def test_a_cpu_is_never_damaged() -> None:
    assert damage_of(torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_capture_that_is_broken_off_counts_as_damage() -> None:
    """Nothing random can be drawn after it."""
    done = subprocess.run([sys.executable, "-c", BROKEN_CAPTURE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "raised" in done.stdout
    assert "damage: RuntimeError" in done.stdout
