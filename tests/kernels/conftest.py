from __future__ import annotations

import pytest
import torch

from llmmed.kernels.operator import INTERPRETED, gpu_of


@pytest.fixture
def on_hopper() -> None:
    """Skips what needs Hopper elsewhere."""
    if INTERPRETED or gpu_of(torch.device("cuda", 0)).capability != 90:
        pytest.skip("needs Hopper")
