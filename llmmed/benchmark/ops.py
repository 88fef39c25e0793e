"""Times every implementation of every op at every size and mode, once it is verified there.

The op's cases are gone through once for each compute dtype, a size's own calls before they are timed.

A pass is one size, dtype and mode, all ops after another, in a process of its own: the autotuner's, so that a candidate
that crashes or hangs costs that candidate alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from llmmed.autotune.child import Findings, Limits, Progress, tune_in_child
from llmmed.autotune.journal import Task
from llmmed.autotune.plan import Candidate, Ceilings, Mode
from llmmed.autotune.tuner import why_not
from llmmed.autotune.workload import record_workload
from llmmed.benchmark.results import OpRow
from llmmed.benchmark.settings import ALL, DtypeName, OpsSettings, config_of
from llmmed.config import Config
from llmmed.errors import UserError
from llmmed.kernels.base import Call
from llmmed.kernels.catalog import COMPILED, DEFAULT, implementation_names
from llmmed.training import prepare_backend

_PEERS = ("liger", "flash_attention_2", "flash_attention_3")  # implementations by other projects
_CARRIED = (
    "unavailable",
    "wrong",
    "no_backward",
    "crashed",
    "failed_to_compile",
    "timed_out",
)  # verdicts that another size keeps
# How far an op is, for the bar.
_STAGES = {"warm": 0.0, "ceilings": 0.0, "verify": 0.1, "launch": 0.5, "load": 0.6, "measure": 0.7, "step": 1.0}

Tell = Callable[[float, str], None]
"""Told how much is done, from 0 to 1, and what is being done."""
Keep = Callable[[list[OpRow], dict[str, Ceilings]], None]
"""Given what is known so far whenever an op is done, so that a benchmark that is killed leaves it."""


def run_ops(
    settings: OpsSettings, overrides: Sequence[str], tell: Tell, keep: Keep
) -> Iterator[tuple[list[OpRow], dict[str, Ceilings]]]:
    """Everything that the settings ask for, within their time; gives what is known after every pass.

    `overrides` are the command line's. Ceilings are by size, dtype and mode: each process measures its own.
    """
    deadline = time.perf_counter() + settings.seconds
    passes = _passes(settings, overrides)
    verdicts = _Verdicts()
    rows: list[OpRow] = []
    ceilings: dict[str, Ceilings] = {}
    order = {op: place for place, op in enumerate(settings.op_names)}

    def so_far(more: list[OpRow], measured: dict[str, Ceilings]) -> tuple[list[OpRow], dict[str, Ceilings]]:
        return sorted([*rows, *more], key=lambda row: order[row.op]), ceilings | measured  # sizes stay in their order

    for index, each in enumerate(passes):

        def report(progress: Progress, each: _Pass = each, index: int = index) -> None:
            ops = list(each.calls)
            done = ops.index(progress.op) + _STAGES[progress.stage] if progress.op in ops else 0.0
            tell((index + done / len(ops)) / len(passes), f"{each.title}: {_what(progress)}")

        def keep_op(found: list[OpRow], measured: Ceilings | None, each: _Pass = each) -> None:
            keep(*so_far(found, {each.title: measured} if measured is not None else {}))

        tell(index / len(passes), each.title)
        found, measured = _run(each, settings, verdicts, deadline, report, keep_op)
        rows += found
        rows += list(_copies(each, rows))
        if measured is not None:
            ceilings[each.title] = measured
        tell((index + 1) / len(passes), each.title)
        yield so_far([], {})


@dataclass(frozen=True)
class _Pass:
    size: str
    dtype: DtypeName
    mode: Mode
    config: Config
    calls: dict[str, dict[Call, int]]  # by op; every distinct call once
    measured_before: dict[str, tuple[str, DtypeName]]  # ops whose calls are those of another size or dtype

    @property
    def title(self) -> str:
        return f"{self.size} {self.dtype} {self.mode}"


@dataclass
class _Verdicts:
    """What is known of candidates without their times: by op and dtype, and of failures under the clock by mode too.

    `at_size` are those that passed at a size's own calls, with their error there.
    """

    gate: dict[tuple[str, str], dict[str, Candidate]] = field(default_factory=dict)
    at_size: dict[tuple[str, str, str], dict[str, Candidate]] = field(default_factory=dict)
    clock: dict[tuple[str, str, Mode], dict[str, Candidate]] = field(default_factory=dict)

    def learn(self, each: _Pass, op: str, name: str, found: Candidate) -> None:
        gate = self.gate.setdefault((op, each.dtype), {})
        verified = found.relative_error is not None and found.status != "wrong"
        if verified:
            passed = Candidate(status="verified", relative_error=found.relative_error, worst_ratio=found.worst_ratio)
            gate[name] = self.at_size.setdefault((op, each.dtype, each.size), {})[name] = passed
        if found.status in _CARRIED:
            where = f" (at size {each.size})" if found.status != "unavailable" else ""
            bad = found.model_copy(update={"reason": found.reason + where})
            (self.clock.setdefault((op, each.dtype, each.mode), {}) if verified else gate)[name] = bad

    def of(self, each: _Pass, op: str) -> dict[str, Candidate]:
        """Of those whose verdict is known at this size."""
        bad = {name: c for name, c in self.gate.get((op, each.dtype), {}).items() if c.status != "verified"}
        passed = self.at_size.get((op, each.dtype, each.size), {})
        return passed | bad | self.clock.get((op, each.dtype, each.mode), {})

    def passed_elsewhere(self, each: _Pass, op: str) -> set[str]:
        """Of those that have passed the op's cases, and perhaps not this size's calls."""
        return {name for name, c in self.gate.get((op, each.dtype), {}).items() if c.status == "verified"}


def _passes(settings: OpsSettings, overrides: Sequence[str]) -> list[_Pass]:
    """By dtype, then size, then mode. An op whose calls do not depend on the one or the other is not measured again."""
    passes: list[_Pass] = []
    seen: dict[tuple[Mode, tuple[Call, ...]], tuple[str, DtypeName]] = {}
    sizes: list[str | None] = [*settings.sizes] or [None]
    for dtype in settings.dtypes:
        for size in sizes:
            config = config_of(size, dtype, overrides)
            workload = record_workload(config).by_op()
            for op in settings.ops:
                if op != ALL and op not in workload:
                    raise UserError(f"ops={op}: a step with optimizer={config.optimizer.name} does not call it")
            calls = {op: dict.fromkeys(workload[op], 1) for op in settings.op_names if op in workload}
            for mode in settings.modes:
                before = {op: seen[mode, tuple(found)] for op, found in calls.items() if (mode, tuple(found)) in seen}
                fresh = {op: found for op, found in calls.items() if op not in before}
                seen.update({(mode, tuple(found)): (config.model.name, dtype) for found in fresh.values()})
                passes.append(_Pass(config.model.name, dtype, mode, config, fresh, before))
    return passes


def _copies(each: _Pass, rows: Sequence[OpRow]) -> Iterator[OpRow]:
    """What was measured at another size or in another dtype, with the very calls of this one."""
    for op, (size, dtype) in each.measured_before.items():
        for row in [row for row in rows if (row.op, row.size, row.dtype, row.mode) == (op, size, dtype, each.mode)]:
            note = f"the same calls as {size} in {dtype}, measured there"
            told = "; ".join(filter(None, (row.reason, note if row.total_ms is not None else "")))
            yield row.model_copy(update={"size": each.size, "dtype": each.dtype, "reason": told})


def _run(
    each: _Pass,
    settings: OpsSettings,
    verdicts: _Verdicts,
    deadline: float,
    report: Callable[[Progress], None],
    keep_op: Callable[[list[OpRow], Ceilings | None], None],
) -> tuple[list[OpRow], Ceilings | None]:
    prepare_backend(each.config)
    settled: dict[str, dict[str, Candidate]] = {}
    tasks = []
    for op, calls in each.calls.items():
        names = _names(op, each.mode, settings.peers)
        reasons = {name: why_not(op, name, calls, each.config, each.mode) for name in names}
        settled[op] = {
            name: Candidate(status="unavailable", reason=reason) for name, reason in reasons.items() if reason
        }
        known = {n: c for n, c in verdicts.of(each, op).items() if n in names and n not in settled[op]}
        settled[op] |= {name: candidate for name, candidate in known.items() if candidate.status != "verified"}
        verified = {name: candidate for name, candidate in known.items() if candidate.status == "verified"}
        fresh = [name for name in names if name not in known and name not in settled[op]]
        task = Task.of(op, calls, fresh, measure=True)
        passed = verdicts.passed_elsewhere(each, op)
        known_part = {"verified": verified, "at_own_calls": [name for name in fresh if name in passed]}
        tasks.append(task.model_copy(update=known_part))
    findings = tune_in_child(
        tasks,
        device=each.config.device,
        mode=each.mode,
        deterministic=each.config.train.deterministic,
        step=None,
        limits=Limits(each.config.kernels.candidate_seconds, settings.seconds, deadline),
        report=report,
        timed=lambda known: keep_op([row for row in _rows(each, settings, settled, known) if row.op in known.measured],
                                    known.ceilings),
    )  # fmt: skip
    for op, found in findings.ops.items():
        for name, candidate in found.items():
            verdicts.learn(each, op, name, candidate)
    return list(_rows(each, settings, settled, findings)), findings.ceilings


def _rows(
    each: _Pass, settings: OpsSettings, settled: Mapping[str, dict[str, Candidate]], findings: Findings
) -> Iterator[OpRow]:
    for op, calls in each.calls.items():
        candidates = findings.ops.get(op, {}) | settled[op]
        default = candidates.get(DEFAULT)
        for name in _names(op, each.mode, settings.peers):
            candidate = candidates.get(name)
            if candidate is None:
                continue
            row = OpRow(
                op=op,
                size=each.size,
                shapes="; ".join(call.describe() for call in calls),
                dtype=each.dtype,
                mode=each.mode,
                implementation=name,
                reason=candidate.reason.replace("kernels.budget_seconds", "seconds"),
                least_ms=_least_ms(candidate),
                **{key: getattr(candidate, key) for key in _COPIED},
            )
            yield row.model_copy(update=_speedup(default, candidate))


_COPIED = (
    "status", "relative_error", "forward_ms", "backward_ms", "host_ms", "total_ms", "total_ms_low", "total_ms_high",
    "peak_memory_mib", "share_of_ceiling",
)  # fmt: skip


def _speedup(default: Candidate | None, candidate: Candidate) -> dict[str, float]:
    """Against PyTorch's; its interval is from the ends of both, so that it errs to the wide."""
    if default is None or not default.total_ms or not candidate.total_ms:
        return {}
    if default is candidate:
        return {"speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}
    return {
        "speedup": default.total_ms / candidate.total_ms,
        "speedup_low": (default.total_ms_low or 0.0) / (candidate.total_ms_high or math.inf),
        "speedup_high": (default.total_ms_high or 0.0) / (candidate.total_ms_low or math.inf),
    }


def _least_ms(candidate: Candidate) -> float | None:
    share, forward, backward = candidate.share_of_ceiling, candidate.forward_ms, candidate.backward_ms
    return share * (forward + backward) if share is not None and forward is not None and backward is not None else None


def _names(op: str, mode: Mode, peers: bool) -> list[str]:
    """In a compiled step PyTorch's implementation is compiled, so that `compiled` says nothing new."""
    names = implementation_names(op)
    return [n for n in names if (mode == "eager" or n != COMPILED) and (peers or n not in _PEERS)]


def _what(progress: Progress) -> str:
    doing = {"warm": "compiling", "ceilings": "the device's ceilings", "load": "compiling", "measure": "timing"}
    return " ".join(filter(None, (doing.get(progress.stage, "verifying"), progress.op, progress.name)))
