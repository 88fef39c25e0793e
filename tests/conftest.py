"""Which tests can run here: GPU tests need a GPU, interpreter tests need Triton's interpreter switched on."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmmed.kernels import catalog

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


gc.disable()  # until everything is imported, as `llmmed.collector` has it for a run


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


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


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs planted `rms_norm` kernels as a package, and hides the compiler, which would take most of the time."""
    site = tmp_path / "site"

    def install(*names: str) -> None:
        information = site / "planted_kernels-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-kernels\nVersion: 1.0\n")
        points = (f"{name if '.' in name else f'rms_norm.{name}'} = planted_kernels:{name.upper()}\n" for name in names)
        (information / "entry_points.txt").write_text(f"[{catalog.ENTRY_POINT_GROUP}]\n{''.join(points)}")
        shutil.copy(Path(__file__).parent / "autotune" / "planted_kernels.py", site)
        monkeypatch.syspath_prepend(site)
        catalog._entry_points.cache_clear()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    yield install
    monkeypatch.undo()
    sys.modules.pop("planted_kernels", None)
    catalog._entry_points.cache_clear()
