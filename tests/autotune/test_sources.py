"""The hashes of sources: an edited file of a package that registers a kernel is another kernel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from llmmed.autotune import cache, sources
from llmmed.autotune.hardware import describe_hardware
from llmmed.autotune.sources import project_hash, source_hash
from llmmed.kernels import catalog


def register(site: Path, module: str) -> None:
    information = site / f"{module}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        f"[{catalog.ENTRY_POINT_GROUP}]\nrms_norm.mine = {module}.fast:IMPL\n"
    )


@pytest.mark.parametrize("editable", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_any_file_of_a_package_counts(
    editable: bool, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = source_hash("rms_norm")
    name = f"my_kernels_{editable:d}{large:d}"
    site, home = tmp_path / "site", tmp_path / ("elsewhere" if editable else "site")
    register(site, name)
    (home / name / "csrc").mkdir(parents=True)
    files = [home / name / part for part in ("__init__.py", "fast.py", "csrc/fast.cu")]
    for file in files:
        file.write_text("# version 1\n")
    for folder in {site, home}:  # of `pip install -e`, a .pth file adds the second
        monkeypatch.syspath_prepend(folder)
    if large:
        monkeypatch.setattr(sources, "_READ", 0)
    found = {without, source_hash("rms_norm")}
    for file in files:
        file.write_text("# version 2, edited\n")
        found.add(source_hash("rms_norm"))
    assert len(found) == 2 + len(files)
    assert name not in sys.modules
    assert cache.usable(describe_hardware("cpu"))


def test_all_code_that_takes_the_step_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("autotune/confirm", "model/transformer", "optim/muon", "training/micro_step", "kernels/base", "compose")
    for name in (*names, "kernels/rms_norm/triton_impl", "data/batches"):
        assert (sources._PROJECT / f"{name}.py").exists()
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text("# version 1\n")
    monkeypatch.setattr(sources, "_PROJECT", tmp_path)
    found = {project_hash()}
    (tmp_path / "data" / "batches.py").write_text("# version 2\n")
    assert project_hash() in found
    for name in names:
        (tmp_path / f"{name}.py").write_text("# version 2\n")
        found.add(project_hash())
    assert len(found) == 1 + len(names)


def test_nothing_is_kept_of_a_package_that_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path, "nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert not cache.usable(describe_hardware("cpu"))
