"""The plan on disk: it survives the way there and back, and what is no plan is told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmmed.autotune.plan import CallCount, Candidate, Ceilings, Hardware, KernelPlan, OpPlan
from llmmed.errors import UserError
from llmmed.reporting.kernel_table import closing_line


@pytest.fixture
def plan() -> KernelPlan:
    candidates = {
        "pytorch": Candidate(status="verified", relative_error=1e-7, total_ms=2.0, speedup=1.0),
        "triton": Candidate(status="verified", relative_error=1e-7, total_ms=1.0, speedup=2.0, reason="fastest"),
    }
    call = CallCount(op="rms_norm", arguments={"eps": 1e-5}, count=3)
    hardware = Hardware(device="x", driver=None, cuda=None, torch="2", triton=None, python="3", cpu="x", cpu_threads=1)
    return KernelPlan(
        policy="auto",
        mode="eager",
        ops={
            "rms_norm": OpPlan(
                chosen="triton", reason="fastest", calls=[call], candidates=candidates, source_sha256="0"
            )
        },
        hardware=hardware,
        ceilings=Ceilings(copy_gb_per_second=3000, product_tflops={"bfloat16": 800}),
        workload_fingerprint="f",
        cached=False,
        tuning_seconds=1.5,
    )


def test_survives_the_disk(plan: KernelPlan, tmp_path: Path) -> None:
    plan.write(tmp_path / "kernels.json")
    assert KernelPlan.read(tmp_path / "kernels.json") == plan
    assert KernelPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_summary(plan: KernelPlan) -> None:
    assert plan.choice == {"rms_norm": "triton"}
    assert plan.summary() == {
        "execution_mode": "eager",
        "kernels/rms_norm": "triton",
        "kernels/rms_norm/speedup": 2.0,
        "use_triton_rmsnorm": True,
    }


def test_a_plan_may_say_no_more_than_what_to_take(plan: KernelPlan) -> None:
    bare = plan.ops["rms_norm"].model_copy(update={"candidates": {}})
    bare_plan = plan.model_copy(update={"ops": {"rms_norm": bare}})
    assert bare_plan.summary() == {
        "execution_mode": "eager",
        "kernels/rms_norm": "triton",
        "use_triton_rmsnorm": True,
    }
    assert "triton[/] for rms_norm" in closing_line(bare_plan)


@pytest.mark.parametrize(
    ("ops", "told"),
    [
        ("layer_norm", "plan=.*: there is no op 'layer_norm'"),
        ("rms_norm", "plan=.*'rms_norm' has no implementation 'no'"),
    ],
)
def test_a_plan_that_is_stated_names_what_there_is(plan: KernelPlan, ops: str, told: str, tmp_path: Path) -> None:
    chosen = plan.ops["rms_norm"].model_copy(update={"chosen": "no"})
    plan.model_copy(update={"ops": {ops: chosen}}).write(tmp_path / "kernels.json")
    with pytest.raises(UserError, match=told):
        KernelPlan.read_stated("plan", str(tmp_path / "kernels.json"))


def test_is_immutable_and_finite(plan: KernelPlan) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan.cached = True  # type: ignore[misc]
    with pytest.raises(ValidationError, match="finite"):
        Candidate(status="verified", relative_error=float("nan"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("{", "is not a kernel plan"),
        ('{"schema_version": 2}', "schema_version"),
    ],
)
def test_what_is_no_plan_is_told_in_one_line(content: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=told) as raised:
        KernelPlan.read(path)
    assert "\n" not in str(raised.value)
