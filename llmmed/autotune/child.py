"""Runs the tuning process, and starts it again without the candidate that it died of, until all is tried.

A hanging compiler, a segmentation fault or a poisoned GPU context ends that process only. Here no candidate is loaded
and no CUDA context is made.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from llmmed.autotune.journal import (
    Begun,
    CeilingsFound,
    Done,
    Event,
    Job,
    JournalReader,
    Judged,
    Launched,
    Stage,
    StepDone,
    StepExpected,
    StepTask,
    Task,
    Timed,
    Tried,
)
from llmmed.autotune.plan import Candidate, Ceilings, Mode, Status, StepEvidence, StepTrial
from llmmed.autotune.warming import Warming, compiles_ahead, warming_processes
from llmmed.processes import Process, Starter, end, how_it_ended, last_line, last_lines, started_process
from llmmed.template import STARTS_OVER, Template

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_SEARCHING = 0.04  # of the budget: what the search for launches may take
_IMPORTED = ["llmmed.autotune.preload"]
_WHILE_IMPORTING = {"OPENBLAS_NUM_THREADS": "1"}  # else NumPy's import starts threads, which no fork would have
_DONE = {
    "verify": "verified",
    "launch": "launched in other ways",
    "load": "loaded",
    "measure": "measured",
    "ceilings": "measured",
    "step": "tried in the step",
}
_DOING = {
    "warm": "compiling on all cores",
    "verify": "verifying",
    "launch": "searching launch parameters of",
    "load": "loading",
    "measure": "measuring",
    "ceilings": "measuring the device's ceilings",
    "step": "trying in the step",
}


@dataclass(frozen=True)
class Limits:
    """Seconds: for one candidate's turn, for all searches for launches, and the `time.perf_counter()` at which tuning
    ends."""

    candidate_seconds: float
    budget_seconds: float
    deadline: float
    searching_seconds: float = 5.0


@dataclass(frozen=True)
class Progress:
    """What tuning is at; `str` makes a line of it."""

    stage: Stage
    op: str
    name: str
    judged: int
    candidates: int
    seconds: float

    def __str__(self) -> str:
        what = " ".join(filter(None, (_DOING[self.stage], self.op, self.name)))
        return f"tuning: {what} ({self.judged} of {self.candidates} judged, {self.seconds:.0f} s)"


@dataclass
class Findings:
    """What is known so far: verdicts by op and name, the ops that are measured, the ceilings.

    `launched` are the candidates, by op, whose launches are settled. `step` is what the step said, `expected` what it
    will say by its trials alone, `step_reason` why it said nothing, `default_runs` whether that is the default's fault,
    `last_match_died` what a process died of when all trials were over. `cut_short` says why not all was done: the
    budget, or no process could be started. `seconds` are those that each stage took.
    """

    ops: dict[str, dict[str, Candidate]] = field(default_factory=dict)
    launched: dict[str, set[str]] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)
    ceilings: Ceilings | None = None
    trials: list[StepTrial] = field(default_factory=list)
    step: StepEvidence | None = None
    expected: StepEvidence | None = None
    step_reason: str = ""
    default_runs: bool = True
    last_match_died: str = ""
    cut_short: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        if isinstance(event, Judged):
            self.ops.setdefault(event.op, {})[event.name] = event.candidate
        elif isinstance(event, Launched):
            found = self.ops[event.op]
            found[event.name] = found[event.name].model_copy(update={"launches": event.launches})
            self.launched.setdefault(event.op, set()).add(event.name)
        elif isinstance(event, Timed):
            self.ops.setdefault(event.op, {}).update(event.candidates)
            self.measured.add(event.op)
        elif isinstance(event, CeilingsFound):
            self.ceilings = event.ceilings
        elif isinstance(event, Tried):
            self.trials.append(event.trial)
        elif isinstance(event, StepExpected):
            self.expected = event.evidence
        elif isinstance(event, StepDone):
            self.step, self.step_reason = event.evidence, event.reason
            self.default_runs = event.evidence is not None

    def left(self, tasks: list[Task]) -> list[Task]:
        """The tasks without what is done."""
        rest = []
        for task in tasks:
            known = self.ops.get(task.op, {})
            verify = [name for name in task.verify if name not in known]
            verified = {name: c for name, c in known.items() if c.status == "verified"}
            measure = task.measure and task.op not in self.measured
            if verify or (measure and verified):
                launched = sorted(self.launched.get(task.op, ()))
                known_part = {"verify": verify, "verified": verified, "measure": measure, "launched": launched}
                rest.append(task.model_copy(update=known_part))
        return rest


@contextlib.contextmanager
def processes_to_come(device: str) -> Iterator[Starter]:
    """What starts tuning's processes, until the end of the context. Where there may be many, they are forks of one that
    imports from now on, whatever goes on here meanwhile."""
    if sys.platform != "linux" or not compiles_ahead(device):
        yield started_process
        return
    with (
        tempfile.TemporaryDirectory(prefix="llmmed-template-") as folder,
        Template.started(_IMPORTED, Path(folder) / "template.log", _WHILE_IMPORTING) as template,
    ):
        yield template.started_process


def tune_in_child(
    tasks: list[Task],
    *,
    device: Literal["cuda", "cpu"],
    mode: Mode,
    deterministic: bool,
    step: StepTask | None,
    limits: Limits,
    report: Callable[[Progress], None],
    timed: Callable[[Findings], None] | None = None,
    findings: Findings | None = None,
    start: Starter | None = None,
) -> Findings:
    """Tries every candidate of every task, then, if asked to, the best of them in the step.

    Each candidate gets a verdict, the last resort being `not_tried`. What a task names as verified is measured with the
    rest, and not verified again. `timed` is told what is known whenever an op's times have come. `findings` is what is
    known already, and grows: whatever ends this, it has what was found until then. `start` is that of
    `processes_to_come`, if there was time to begin with them before.
    """
    findings = Findings() if findings is None else findings
    for task in tasks:
        findings.ops.setdefault(task.op, {}).update(task.verified)
    reason = ""
    with tempfile.TemporaryDirectory(prefix="llmmed-tuning-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        attempt = 0
        first = Job(
            journal=folder / "journal.jsonl",
            device=device,
            mode=mode,
            deterministic=deterministic,
            matmul_precision=torch.get_float32_matmul_precision(),
            tasks=findings.left(tasks),
            step=step,
            seconds=limits.deadline - time.perf_counter(),
        )
        if start is None:
            start = stack.enter_context(processes_to_come(device)) if warming_processes(first) else started_process
        warming: Warming | None = None
        while True:
            left, confirm = findings.left(tasks), _confirmation(step, findings)
            if not left and confirm is None:
                break
            path = folder / f"job{attempt}.json"
            job = first.model_copy(
                update={
                    "journal": folder / f"journal{attempt}.jsonl",
                    "tasks": left,
                    "ceilings": findings.ceilings,
                    "step": confirm,
                    "seconds": limits.deadline - time.perf_counter(),
                    "searching_seconds": _searching_seconds(limits, findings),
                    "warm": folder / "warm" if warming_processes(first) else None,
                }
            )
            job.write(path)
            with start("llmmed.autotune.worker", [str(path)], path.with_suffix(".log")) as process:
                if attempt == 0 and job.warm is not None:
                    warming = stack.enter_context(Warming.started(first, folder, limits.candidate_seconds, start))
                watched = _Attempt(job, tasks, findings, limits, report, timed, warming)
                reason = watched.follow(process, path.with_suffix(".log"))
            if reason:
                break
            attempt += 1
    findings.cut_short = reason
    _fill_in(findings, tasks, reason)
    return findings


def _confirmation(step: StepTask | None, findings: Findings) -> StepTask | None:
    """What is left to do in the step: all of it, or what a process that died did not come to."""
    if step is None or findings.step is not None or findings.step_reason:
        return None
    known = {op: step.known.get(op, {}) | findings.ops.get(op, {}) for op in {*step.known, *findings.ops}}
    proved = {(op, name) for op, by_name in known.items() for name, c in by_name.items() if c.status == "verified"}
    trials = [trial for trial in findings.trials if (trial.op, trial.name) in proved]  # of an earlier run, perhaps
    found = {"known": known, "trials": trials, "last_match_died": findings.last_match_died}
    return step.model_copy(update=found)


def _searching_seconds(limits: Limits, findings: Findings) -> float:
    """What is left for the search for launches, after what processes before took of it."""
    most = min(limits.searching_seconds, _SEARCHING * limits.budget_seconds)
    return max(0.0, most - findings.seconds.get("launch", 0.0))


class _Attempt:
    """One tuning process, from its start to its end."""

    def __init__(
        self, job: Job, tasks: list[Task], findings: Findings, limits: Limits, report: Callable[[Progress], None],
        timed: Callable[[Findings], None] | None, warming: Warming | None,
    ) -> None:  # fmt: skip
        self._job = job
        self._warming = warming
        self._timed = timed
        self._findings = findings
        self._limits = limits
        self._report = report
        self._candidates = sum(len(task.verify) for task in tasks)
        self._reader = JournalReader(job.journal)
        self._open: Begun | None = None  # what is being tried
        self._open_since = 0.0
        self._logged: tuple[str, str, str] | None = None
        self._stage, self._stage_since = "start", time.perf_counter()
        self._learnt = False  # whether this process has found anything out
        self._done = False

    def follow(self, process: Process, log: Path) -> str:
        """Follows the process, which has its job, to its end. Returns why tuning cannot go on, or nothing."""
        too_slow = self._watch(process)
        end(process)
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(STARTS_OVER):
                logger.info("each of tuning's processes imports what it needs, which takes longer: one %s", line)
        self._read()
        self._account("")
        if self._done:
            if self._job.step is not None and self._findings.step is None and not self._findings.step_reason:
                self._findings.step_reason = "there is nothing to choose"
            return ""
        if time.perf_counter() >= self._limits.deadline:
            self._findings.step = self._findings.step or self._findings.expected
            if self._findings.step is not None:  # some of the modes may be missing
                self._findings.step = self._findings.step.model_copy(update={"finished": False})
            return f"kernels.budget_seconds={self._limits.budget_seconds:g} was used up"
        last_words = last_line(log)
        if process.returncode not in (0, -signal.SIGKILL):
            logger.info("the tuning process %s; its last lines:\n%s", how_it_ended(process.returncode), last_lines(log))
        if too_slow is not None and self._open is not too_slow:
            return ""  # it came to its end in that very moment
        if self._open is not None and self._open.name:
            self._reject(self._open, too_slow is not None, process.returncode, last_words)
            return ""
        if self._open is not None and self._open.stage == "step":
            ended = f"the process {how_it_ended(process.returncode)}{f': {last_words}' if last_words else ''}"
            self._findings.step_reason = f"the default plan in the step: {ended}"
            self._findings.default_runs = False
            return ""
        if self._learnt:
            return ""
        told = f": {last_words}" if last_words else ""
        reason = f"the tuning process {how_it_ended(process.returncode)}{told}"
        logger.warning("%s; the kernels that are not tuned are PyTorch's", reason)
        return reason

    def _watch(self, process: Process) -> Begun | None:
        """Follows the process until it ends or has to. Returns what took too long, if anything did."""
        while process.poll() is None:
            self._read()
            if self._warming is not None:
                self._warming.look()
            now = time.perf_counter()
            if self._done or now >= self._limits.deadline:
                return None
            open_seconds = now - self._open_since
            if self._open is not None and self._open.name and open_seconds > self._limits.candidate_seconds:
                return self._open
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
        return None

    def _read(self) -> None:
        for event in self._reader.read():
            self._findings.add(event)
            if isinstance(event, Begun):
                self._open, self._open_since = event, time.perf_counter()
                self._account(event.stage)
                self._tell(event)
            elif isinstance(event, Done):
                self._done = True
            else:
                self._open = None
                self._learnt = True
                if isinstance(event, Timed) and self._timed is not None:
                    self._timed(self._findings)

    def _account(self, stage: str) -> None:
        """Books the time since the last change of stage to the stage that ends."""
        now = time.perf_counter()
        seconds = self._findings.seconds
        seconds[self._stage] = seconds.get(self._stage, 0.0) + now - self._stage_since
        self._stage, self._stage_since = stage, now

    def _tell(self, event: Begun) -> None:
        known = [c for op in self._findings.ops.values() for c in op.values()]
        seconds = self._limits.budget_seconds - (self._limits.deadline - time.perf_counter())
        progress = Progress(event.stage, event.op, event.name, len(known), self._candidates, seconds)
        subject = (event.stage, event.op, event.name if event.stage != "measure" else "")  # they take turns
        if subject != self._logged:
            logger.info("%s", progress)
            self._logged = subject
        self._report(progress)

    def _reject(self, culprit: Begun, too_slow: bool, exit_code: int, last_words: str) -> None:
        doing = f"while it was {_DONE[culprit.stage]}"
        status: Status = "timed_out" if too_slow else "crashed"
        limit = f"took longer than kernels.candidate_seconds={self._limits.candidate_seconds:g}"
        reason = limit if too_slow else f"the process {how_it_ended(exit_code)}"
        told = f": {last_words}" if last_words and not too_slow and exit_code > 0 else ""
        if culprit.stage == "step" and not culprit.op:
            if self._findings.step is None:  # else it was another mode, which then is not taken
                self._findings.last_match_died = f"{reason} {doing}{told}"
                self._findings.expected = None  # whatever its trials say
            return
        if culprit.stage == "step":
            trial = StepTrial(
                op=culprit.op, name=culprit.name, against="", status="failed", reason=f"{reason} {doing}{told}"
            )
            self._findings.trials.append(trial)
            return
        if culprit.stage == "launch":  # as it is launched by default, it has passed
            logger.info("%s %s keeps its default launches: %s %s%s", culprit.op, culprit.name, reason, doing, told)
            self._findings.launched.setdefault(culprit.op, set()).add(culprit.name)
            return
        known = self._findings.ops.setdefault(culprit.op, {})
        before = known.get(culprit.name, Candidate(status="not_tried"))
        known[culprit.name] = before.model_copy(update={"status": status, "reason": f"{reason} {doing}{told}"})


def _fill_in(findings: Findings, tasks: list[Task], reason: str) -> None:
    """Gives every candidate that tuning did not come to a verdict that says so."""
    for task in tasks:
        known = findings.ops.setdefault(task.op, {})
        for name in [*task.verify, *task.verified]:
            if name not in known:
                known[name] = Candidate(status="not_tried", reason=f"not tried: {reason}")
            elif task.measure and task.op not in findings.measured and known[name].status == "verified":
                known[name] = known[name].model_copy(update={"reason": f"verified, not timed: {reason}"})
