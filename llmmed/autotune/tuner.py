"""Ties the autotuner together: which candidates, what is known of them, what is tried, what is chosen.

This is the parent's side. It loads no candidate and makes no CUDA context: it reads what the tuning process found.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llmmed.autotune import cache
from llmmed.autotune.child import Limits, Progress, tune_in_child
from llmmed.autotune.choose import Decision, choose, confirmed, force
from llmmed.autotune.evidence import Evidence, evidence_of, findings_of, lasting
from llmmed.autotune.hardware import describe_hardware
from llmmed.autotune.journal import StepTask, Task, call_counts
from llmmed.autotune.plan import Candidate, Hardware, KernelLaunch, KernelPlan, Mode, OpPlan
from llmmed.autotune.sources import source_hash
from llmmed.autotune.turns import turn
from llmmed.autotune.workload import Workload
from llmmed.compose import as_dict
from llmmed.config import Config, KernelsConfig
from llmmed.errors import UserError
from llmmed.kernels.base import Call, Unavailable
from llmmed.kernels.catalog import (
    COMPILED,
    DEFAULT,
    get_implementation,
    implementation_names,
    misnamed_entry_points,
    no_such_implementation,
)
from llmmed.processes import Starter

logger = logging.getLogger(__name__)


def tune(
    config: Config, workload: Workload, *, mode: Mode, report: Callable[[Progress], None] = lambda progress: None,
    start: Starter | None = None,
) -> KernelPlan:  # fmt: skip
    """Chooses an implementation for every op of the workload.

    Args:
        config: The run's. `kernels` says what to choose from and how.
        workload: The calls of one micro-batch.
        mode: How the step will run.
        report: Told what is being tried.
        start: What `child.processes_to_come` gave, if the processes could be begun with before.

    Raises:
        UserError: what was asked for is wrong, or cannot be used and there is no fallback.
    """
    started = time.perf_counter()
    calls = workload.by_op()
    orders, known = _refuse(config, calls, mode)
    tasks = _tasks(calls, orders, known, mode)
    hardware = describe_hardware(config.device)
    with contextlib.ExitStack() as held:
        found_out = _find_evidence(config, workload, tasks, orders, known, mode, hardware, report, started, held, start)
    evidence = found_out.evidence
    ops = {}
    for op in calls:
        found = known[op] | evidence.ops.get(op, {})
        ordered = {name: found[name] for name in _names(op, found)}
        decision = _decide(op, orders[op], ordered, config.kernels)
        if orders[op] is None:
            decision = confirmed(
                op,
                decision,
                evidence.step,
                [trial for trial in evidence.trials if trial.op == op],
                unanswered=evidence.step_reason,
                default_runs=evidence.default_runs,
            )
        if decision.warning:
            logger.warning("%s", decision.warning)
        _warn_of_refused_launches(op, orders[op], decision)
        ops[op] = OpPlan(
            chosen=decision.chosen,
            reason=decision.reason,
            calls=call_counts(calls[op]),
            candidates=decision.candidates,
            source_sha256=source_hash(op),
        )
    return KernelPlan(
        policy=config.kernels.policy,
        mode=evidence.step.mode if evidence.step else mode,
        ops=ops,
        hardware=hardware,
        ceilings=evidence.ceilings,
        step=evidence.step,
        workload_fingerprint=workload.fingerprint(),
        cached=found_out.cached,
        tuning_seconds=time.perf_counter() - started,
        tuning_stages=found_out.seconds,
    )


def refuse(config: Config, workload: Workload, mode: Mode) -> None:
    """Raises what `tune` would raise before it tries anything, and tells of kernels that nobody will find."""
    for told in misnamed_entry_points():
        logger.warning("%s", told)
    _refuse(config, workload.by_op(), mode)


def _refuse(
    config: Config, calls: Mapping[str, dict[Call, int]], mode: Mode
) -> tuple[dict[str, _Order | None], dict[str, dict[str, Candidate]]]:
    """What is asked for by op, and the candidates that need no trying. Raises `UserError` if they do not agree."""
    orders = _orders(config.kernels, list(calls))
    known = {op: _without_trying(op, orders[op], calls[op], config, mode) for op in calls}
    for op, order in orders.items():
        if order is not None and order.name in known[op]:
            _decide(op, order, known[op], config.kernels)
    return orders, known


@dataclass(frozen=True)
class _Order:
    """An implementation that is not up for choice, the setting that asks for it, and the launches that it asks for."""

    name: str
    cause: str
    launches: list[KernelLaunch] = field(default_factory=list)


def _orders(kernels: KernelsConfig, ops: list[str]) -> dict[str, _Order | None]:
    """What is asked for, by op: by a pin, else by a plan, else by the policy; None leaves it to measurement."""
    planned = KernelPlan.read_stated("kernels.plan", kernels.plan).ops if kernels.plan is not None else {}
    orders: dict[str, _Order | None] = {}
    for op in ops:
        pin = kernels.pin.get(op)
        if pin is not None:
            if pin not in implementation_names(op):
                raise UserError(f"kernels.pin.{op}={pin}: {no_such_implementation(op, pin)}")
            orders[op] = _Order(pin, f"kernels.pin.{op}={pin}")
        elif op in planned:
            name = planned[op].chosen
            found = planned[op].candidates.get(name)
            orders[op] = _Order(name, f"kernels.plan={kernels.plan}", found.launches if found is not None else [])
        else:
            orders[op] = None if kernels.policy == "auto" else _Order(kernels.policy, f"kernels={kernels.policy}")
    return orders


def _names(op: str, found: Mapping[str, Candidate]) -> list[str]:
    """The names of candidates, in the catalog's order; what the catalog does not know comes last."""
    listed = [name for name in implementation_names(op) if name in found]
    return listed + [name for name in found if name not in listed]


def _listed(op: str, mode: Mode) -> list[str]:
    """What there is to choose from. In a compiled step the default is compiled, so that `compiled` says nothing new."""
    return [name for name in implementation_names(op) if mode == "eager" or name != COMPILED]


def _without_trying(
    op: str, order: _Order | None, calls: Mapping[Call, int], config: Config, mode: Mode
) -> dict[str, Candidate]:
    """The candidates that need no trying: those that cannot be used here, and a default that was asked for."""
    if order is not None and order.name == DEFAULT:
        return {DEFAULT: Candidate(status="not_tried")}
    names = _listed(op, mode) if order is None else (order.name,)
    reasons = {name: why_not(op, name, calls, config, mode) for name in names}
    return {name: Candidate(status="unavailable", reason=reason) for name, reason in reasons.items() if reason}


def why_not(op: str, name: str, calls: Mapping[Call, int], config: Config, mode: Mode) -> str | None:
    """Why a candidate cannot be used in this run, as far as its description tells; or None."""
    if name not in implementation_names(op):
        return no_such_implementation(op, name)
    try:
        implementation = get_implementation(op, name)
    except Unavailable as error:
        return str(error)
    if mode != "eager" and name == COMPILED:
        return f"in a compiled step {DEFAULT} is compiled too; train.compile=eager tells them apart"
    if mode != "eager" and not implementation.compiles:
        return "cannot be part of a compiled step; train.compile=eager can use it"
    trains = any(spec.requires_grad for call in calls for spec in call.tensors.values())
    if trains and not implementation.backward:
        return "has no backward pass, and this run trains through it"
    if config.train.deterministic and not implementation.deterministic:
        return "gives other bits on every run, and train.deterministic=true"
    device = torch.device(config.device)
    return next(filter(None, (implementation.why_not(device, call.compute_dtype) for call in calls)), None)


def _tasks(
    calls: Mapping[str, dict[Call, int]],
    orders: Mapping[str, _Order | None],
    known: Mapping[str, dict[str, Candidate]],
    mode: Mode,
) -> list[Task]:
    """What is to be tried: what was asked for first, since without its verdict the run cannot begin.

    Where only the default is left to choose there is nothing to try, and `known` says so.
    """
    tasks = []
    for op, order in sorted(orders.items(), key=lambda item: item[1] is None):
        names = _listed(op, mode) if order is None else (order.name,)
        untried = [name for name in names if name not in known[op]]
        if untried == [DEFAULT] and order is None:
            known[op][DEFAULT] = Candidate(status="not_tried", reason="nothing else can be used here")
        elif untried:
            given = {order.name: order.launches} if order is not None and order.launches else {}
            tasks.append(Task.of(op, calls[op], untried, measure=order is None, launches=given))
    return tasks


@dataclass(frozen=True)
class _FoundOut:
    """What tuning gave: evidence, and seconds by stage."""

    evidence: Evidence
    seconds: dict[str, float] = field(default_factory=dict)
    cached: bool = False


def _find_evidence(
    config: Config,
    workload: Workload,
    tasks: list[Task],
    orders: Mapping[str, _Order | None],
    known: Mapping[str, dict[str, Candidate]],
    mode: Mode,
    hardware: Hardware,
    report: Callable[[Progress], None],
    started: float,
    held: contextlib.ExitStack,
    start: Starter | None,
) -> _FoundOut:
    """From the cache, or from a tuning process. `held` is what keeps others from tuning the same meanwhile."""
    if not tasks:
        return _FoundOut(Evidence(ops={}))
    kernels = config.kernels
    step = _step_task(config, orders, known) if any(task.measure for task in tasks) else None
    key = cache.fingerprint(
        workload=workload,
        candidates={task.op: task.verify for task in tasks},
        timed=[task.op for task in tasks if task.measure],
        device=config.device,
        hardware=hardware,
        mode=mode,
        deterministic=config.train.deterministic,
        candidate_seconds=kernels.candidate_seconds,
        launches={task.op: task.launches for task in tasks if task.launches},
        step=_depends_on(config, step) if step else None,
    )
    kept = kernels.cache != "none" and cache.usable(hardware)
    if kept and kernels.cache == "use":
        asked = time.perf_counter()
        held.enter_context(turn(key, kernels.budget_seconds))
        started += time.perf_counter() - asked  # the budget is for tuning
    before = cache.load(key) if kept and kernels.cache == "use" else None
    if before is not None and before.finished:
        return _FoundOut(before, cached=True)
    findings, ended = findings_of(before, tasks), False
    try:
        tune_in_child(
            tasks,
            device=config.device,
            mode=mode,
            deterministic=config.train.deterministic,
            step=step,
            limits=Limits(kernels.candidate_seconds, kernels.budget_seconds, started + kernels.budget_seconds),
            report=report,
            findings=findings,
            start=start,
        )
        ended = True
    finally:  # an interruption too: the next run goes on from here
        evidence = evidence_of(findings, before, finished=ended)
        worth_keeping = lasting(evidence)
        if kept and worth_keeping.ops:
            cache.store(key, worth_keeping)
    if findings.step is not None and findings.step_reason:
        logger.warning("the step is tried in %s mode: %s", findings.step.mode, findings.step_reason)
    if step is not None and evidence.step is None:
        level = logging.INFO if findings.default_runs else logging.WARNING
        logger.log(level, "not confirmed in the step: %s", evidence.step_reason)
    return _FoundOut(evidence, findings.seconds)


def _step_task(
    config: Config, orders: Mapping[str, _Order | None], known: Mapping[str, dict[str, Candidate]]
) -> StepTask:
    pinned = {op: order.name for op, order in orders.items() if order is not None}
    return StepTask(config=as_dict(config), pinned=pinned, known=dict(known))


def _depends_on(config: Config, step: StepTask) -> dict[str, Any]:
    """What the step's answer depends on, beside what the ops' own times depend on."""
    values, kernels = as_dict(config), config.kernels
    train = ("seq_len", "micro_batch_size", "global_batch_tokens", "precision", "compile", "activation_checkpointing")
    return {
        "model": {name: value for name, value in values["model"].items() if name not in ("name", "init_from")},
        "train": {name: values["train"].get(name) for name in train},
        "optimizer": values["optimizer"]["name"],
        "terms": [kernels.objective, kernels.margin, kernels.memory_budget_gib],
        "pinned": step.pinned,
    }


def _warn_of_refused_launches(op: str, order: _Order | None, decision: Decision) -> None:
    """Tells what of a plan's launch parameters is not used here."""
    found = {launch.site: launch for launch in decision.candidates[decision.chosen].launches}
    for wanted in order.launches if order is not None and order.name == decision.chosen else ():
        launch = found.get(wanted.site)
        if launch is None:
            reason = "this run does not launch it at that shape"
        elif launch.chosen != wanted.chosen:
            reason = f"here it is {launch.tried[-1].reason}"
        else:
            continue
        logger.warning(
            "op '%s': the plan's launch of %s is not used: %s; it is launched by default", op, wanted.kernel, reason
        )


def _decide(op: str, order: _Order | None, candidates: Mapping[str, Candidate], kernels: KernelsConfig) -> Decision:
    if order is None:
        return choose(op, candidates, kernels.margin)
    return force(op, candidates, order.name, order.cause, fallback=kernels.on_unavailable == "fallback")
