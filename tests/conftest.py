"""Which tests can run here: GPU tests need a GPU, interpreter tests need Triton's interpreter switched on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("interpreter") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))
    # The long ones first: no process is left with one of them when the others have ended.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never read or fill the user's cache; they share one of their own, so that data is prepared once."""
    monkeypatch.setenv("LLMMED_CACHE", str(tmp_path_factory.getbasetemp() / "llmmed-cache"))


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parent.parent
