"""Whether a run that goes on keeps the kernel plan of its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmmed.autotune.hardware import describe_hardware
from llmmed.autotune.plan import KernelPlan, Mode, first_problem
from llmmed.autotune.sources import source_hash
from llmmed.autotune.tuner import why_not
from llmmed.autotune.workload import Workload
from llmmed.compose import as_dict
from llmmed.config import Config
from llmmed.files import read_json
from llmmed.kernels.catalog import DEFAULT

logger = logging.getLogger(__name__)

_DECIDES = ("policy", "plan", "objective", "memory_budget_gib", "margin", "on_unavailable")  # of kernels


def plan_of_checkpoint(path: Path, config: Config, workload: Workload, mode: Mode) -> KernelPlan | None:
    """The plan that the run was training with; None, and a warning, if it is not what this configuration asks for.

    Args:
        path: The checkpoint.
        config: Of this run.
        workload: The calls that this run makes.
        mode: How its step will run, unless tuning finds a faster one.
    """
    state = read_json(path / "state.json")
    try:
        plan = KernelPlan.from_json(state["plan"])
    except ValidationError as error:
        reason = f"its plan cannot be read by this version: {first_problem(error)}"
    else:
        reason = _outdated(plan, state.get("config", {}), config, workload, mode)
        if not reason:
            return plan
    logger.warning("the checkpoint's kernels are not taken over: %s; they are chosen anew", reason)
    return None


def _outdated(plan: KernelPlan, stored: Mapping[str, Any], config: Config, workload: Workload, mode: Mode) -> str:
    if plan.mode != mode and config.train.compile != "auto":
        return f"the step runs {mode} and ran {plan.mode}"
    if not plan.hardware.computes_as(describe_hardware(config.device)):
        return f"the {'GPU' if config.device == 'cuda' else 'machine'} or its software is another"
    if plan.workload_fingerprint != workload.fingerprint():
        return "the step makes other calls"
    old, new = stored.get("kernels", {}) | {"policy": plan.policy}, as_dict(config)["kernels"]
    for key in _DECIDES:
        if old.get(key, new[key]) != new[key]:
            return f"kernels.{key} is {new[key]} and was {old[key]}"
    if new["cache"] == "refresh" and old.get("cache") != "refresh":
        return "kernels.cache=refresh"
    if config.train.deterministic and not stored.get("train", {}).get("deterministic", False):
        return "train.deterministic=true"  # which the gate has not looked for
    calls = workload.by_op()
    for op, found in plan.ops.items():
        pin, old_pin = config.kernels.pin.get(op), old.get("pin", {}).get(op)
        if pin != old_pin and pin != found.chosen:
            return f"kernels.pin.{op} is {pin or 'null'} and {op} was {found.chosen}"
        if found.source_sha256 != source_hash(op):
            return f"the sources of {op} have changed"
        refusal = why_not(op, found.chosen, calls[op], config, plan.mode) if found.chosen != DEFAULT else None
        if refusal is not None:
            return f"{op}'s {found.chosen} {refusal}"
    return ""
