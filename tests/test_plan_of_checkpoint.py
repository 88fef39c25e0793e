"""A run that goes on keeps its checkpoint's kernels only as long as they are what it asks for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmmed.autotune.plan import KernelPlan
from llmmed.autotune.tuner import tune
from llmmed.autotune.workload import Workload, record_workload
from llmmed.compose import as_dict
from llmmed.config import Config
from llmmed.files import write_json
from llmmed.kernels import catalog
from llmmed.plan_of_checkpoint import plan_of_checkpoint
from tests.training.tiny import tiny_config


@pytest.fixture(scope="module")
def started() -> tuple[Config, Workload, KernelPlan]:
    """What a run was started with: kernels=auto, with `compiled` chosen for rms_norm."""
    config = tiny_config("train.compile=eager")
    workload = record_workload(config)
    plan = tune(replace(config, kernels=replace(config.kernels, policy="pytorch")), workload, mode="eager")
    chosen = plan.ops["rms_norm"].model_copy(update={"chosen": "compiled"})
    return config, workload, plan.model_copy(update={"policy": "auto", "ops": plan.ops | {"rms_norm": chosen}})


def kept(started: tuple[Config, Workload, KernelPlan], config: Config, folder: Path) -> bool:
    old, workload, plan = started
    write_json(folder / "state.json", {"plan": plan.to_json(), "config": as_dict(old)})
    return plan_of_checkpoint(folder, config, workload, "eager") == plan


def changed(config: Config, **kernels: Any) -> Config:
    return replace(config, kernels=replace(config.kernels, **kernels))


def test_what_decides_nothing_changes_nothing(
    started: tuple[Config, Workload, KernelPlan], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(started[0], budget_seconds=1.0, cache="none", pin={"rms_norm": "compiled"})
    assert kept(started, config, tmp_path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"policy": "pytorch"}, "kernels.policy is pytorch and was auto"),
        ({"objective": "memory"}, "kernels.objective is memory and was time"),
        ({"memory_budget_gib": 2.0}, "kernels.memory_budget_gib is 2.0 and was None"),
        ({"cache": "refresh"}, "kernels.cache=refresh"),
        ({"pin": {"rms_norm": "pytorch"}}, "kernels.pin.rms_norm is pytorch and rms_norm was compiled"),
    ],
)
def test_settings_that_decide(
    change: dict[str, Any],
    told: str,
    started: tuple[Config, Workload, KernelPlan],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not kept(started, changed(started[0], **change), tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"the checkpoint's kernels are not taken over: {told}; they are chosen anew"
    ]


@pytest.mark.parametrize(
    ("what", "value", "told"),
    [
        ("hardware", {"device": "another GPU"}, "the machine or its software is another"),
        ("workload_fingerprint", "f" * 64, "the step makes other calls"),
        ("mode", "graphs", "the step runs eager and ran graphs"),
    ],
)
def test_a_plan_from_elsewhere(
    what: str,
    value: Any,
    told: str,
    started: tuple[Config, Workload, KernelPlan],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, workload, plan = started
    if what == "hardware":
        value = plan.hardware.model_copy(update=value)
    assert not kept((config, workload, plan.model_copy(update={what: value})), config, tmp_path)
    assert f"are not taken over: {told};" in caplog.text


def test_with_a_gpu_the_host_does_not_matter(started: tuple[Config, Workload, KernelPlan]) -> None:
    """A job that a cluster starts again has other cores, and must compute the same."""
    here = started[2].hardware
    host = {"python": "3.99", "cpu": "another", "cpu_threads": 999}
    assert here.computes_as(here)
    assert not here.computes_as(here.model_copy(update=host))
    gpu = here.model_copy(update={"device": "a GPU", "cuda": "13.0", "driver": "580"})
    assert gpu.computes_as(gpu.model_copy(update=host))
    for key in ("device", "driver", "cuda", "torch", "triton"):
        assert not gpu.computes_as(gpu.model_copy(update={key: "another"}))


def test_determinism_is_asked_of_the_gate(
    started: tuple[Config, Workload, KernelPlan], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(started[0], train=replace(started[0].train, deterministic=True))
    assert not kept(started, config, tmp_path)
    assert "train.deterministic=true" in caplog.text


def test_an_implementation_that_is_no_longer_admitted(
    started: tuple[Config, Workload, KernelPlan], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, workload, plan = started
    chosen = plan.ops["rms_norm"].model_copy(update={"chosen": "triton"})
    moved = config, workload, plan.model_copy(update={"ops": plan.ops | {"rms_norm": chosen}})
    assert not kept(moved, config, tmp_path)
    assert "rms_norm's triton needs a CUDA GPU" in caplog.text


def test_other_sources(
    started: tuple[Config, Workload, KernelPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(catalog, "op_folder", lambda op: tmp_path)
    assert not kept(started, started[0], tmp_path)
    assert "the sources of " in caplog.text


def test_a_plan_of_another_version(
    started: tuple[Config, Workload, KernelPlan], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"plan": started[2].to_json() | {"novelty": 1}}))
    assert plan_of_checkpoint(tmp_path, started[0], started[1], "eager") is None
    assert "novelty" in caplog.text
