"""The tuning cache: the key holds all that evidence depends on, and no state of the disk stops a run."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from llmmed.autotune import cache
from llmmed.autotune.hardware import UNKNOWN_GPU, describe_hardware
from llmmed.autotune.plan import Candidate, KernelLaunch
from llmmed.autotune.workload import Workload
from llmmed.kernels import catalog

EVIDENCE = cache.Evidence(ops={"rms_norm": {"pytorch": Candidate(status="verified", total_ms=1.0)}})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMMED_CACHE", str(tmp_path))
    return tmp_path / "plans"


@pytest.fixture
def facts(norms: Workload) -> dict[str, Any]:
    return {
        "workload": norms,
        "candidates": {"rms_norm": ["pytorch", "triton"]},
        "timed": ["rms_norm"],
        "device": "cpu",
        "hardware": describe_hardware("cpu"),
        "mode": "eager",
        "deterministic": False,
        "candidate_seconds": 60.0,
        "launches": {},
        "step": None,
    }


def test_comes_back() -> None:
    assert cache.load("0" * 64) is None
    cache.store("0" * 64, EVIDENCE)
    assert cache.load("0" * 64) == EVIDENCE


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema_version": 1}', "\udcff"])
def test_a_damaged_entry_is_ignored_with_a_warning(damage: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.store("k", EVIDENCE)
    (folder / "k.json").write_bytes(damage.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        assert cache.load("k") is None
    assert len(caplog.records) == 1
    cache.store("k", EVIDENCE)
    assert cache.load("k") == EVIDENCE


def test_a_foreign_entry_is_ignored_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.store("k", EVIDENCE)
    (folder / "k.json").rename(folder / "other.json")
    assert cache.load("other") is None
    assert "another fingerprint" in caplog.text


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMMED_CACHE", str(tmp_path / "file"))
    cache.store("k", EVIDENCE)
    assert "cannot be written" in caplog.text
    assert cache.load("k") is None


def test_two_writers_at_once_leave_one_whole_entry(folder: Path) -> None:
    many = [cache.Evidence(ops={f"op{i}": {f"n{j}": Candidate(status="wrong") for j in range(200)}}) for i in range(4)]
    threads = [threading.Thread(target=cache.store, args=("k", evidence)) for evidence in many for _ in range(5)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert cache.load("k") in [None, *many]
    assert cache.load("k") in many
    assert [path.name for path in folder.iterdir()] == ["k.json"]


def test_the_fingerprint_holds_what_evidence_depends_on(facts: dict[str, Any], norms: Workload) -> None:
    base = cache.fingerprint(**facts)
    assert cache.fingerprint(**facts) == base
    changes: dict[str, Any] = {
        "workload": Workload(dict.fromkeys(norms.calls, 6)),
        "candidates": {"rms_norm": ["pytorch"]},
        "timed": [],
        "device": "cuda",
        "hardware": facts["hardware"].model_copy(update={"triton": "0.1"}),
        "mode": "compiled",
        "deterministic": True,
        "candidate_seconds": 1.0,
        "launches": {"rms_norm": {"triton": [KernelLaunch(kernel="k", at={"width": 8}, chosen={"block": 2})]}},
        "step": {"model": "another"},
    }
    found = {name: cache.fingerprint(**(facts | {name: value})) for name, value in changes.items()}
    assert set(found) == set(facts)
    assert len({base, *found.values()}) == 1 + len(changes)


def test_the_fingerprint_holds_the_sources(
    facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = cache.fingerprint(**facts)
    (tmp_path / "reference.py").write_text("changed = True")
    monkeypatch.setattr(catalog, "op_folder", lambda op: tmp_path)
    assert cache.fingerprint(**facts) != base


def test_the_fingerprint_holds_the_environment(facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {cache.fingerprint(**facts)}
    for name in (
        "TRITON_CACHE_DIR",
        "CUDA_HOME",
        "CUDA_VISIBLE_DEVICES",
        "TORCH_LOGS",
        "TORCH_LOGS_OUT",
        "CUDA_MPS_PIPE_DIRECTORY",
        "TORCH_CPP_LOG_LEVEL",
        "CUDA_LOG_FILE",
        "TORCH_FR_BUFFER_SIZE",
        "CUDA_COREDUMP_SHOW_PROGRESS",
    ):
        monkeypatch.setenv(name, "planted")
    assert cache.fingerprint(**facts) in found
    matter = ("TORCHINDUCTOR_MAX_AUTOTUNE", "TRITON_DEBUG", "NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF",
              "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG",
              "TORCH_BLAS_PREFER_CUBLASLT", "TRITON_PTXAS_PATH", "OMP_NUM_THREADS", "MKL_CBWR",
              "KMP_AFFINITY")  # fmt: skip
    for name in matter:
        monkeypatch.setenv(name, "planted")
        found.add(cache.fingerprint(**facts))
    assert len(found) == 1 + len(matter)


def test_an_unnamed_gpu_keeps_nothing() -> None:
    hardware = describe_hardware("cpu")
    assert cache.usable(hardware)
    assert not cache.usable(hardware.model_copy(update={"device": UNKNOWN_GPU}))


def test_an_entry_is_readable_by_people(folder: Path) -> None:
    cache.store("k", EVIDENCE)
    entry = json.loads((folder / "k.json").read_text())
    assert entry["evidence"]["ops"]["rms_norm"]["pytorch"]["status"] == "verified"
