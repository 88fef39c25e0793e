"""The tuning process: verifies every candidate, measures those that passed, and journals each before it is tried.

`child.py` starts it with the path of its job. It may die of a candidate at any time: what it found until then is in the
journal, and the next process goes on without the culprit. Where others compile ahead, it verifies an op as soon as they
are done with it, whichever that is, and takes times when they are done with all.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmmed.autotune.board import ALL, Board
from llmmed.autotune.choose import choose
from llmmed.autotune.confirm import Choice, Duel, Failed, Match, confirm, shortlist
from llmmed.autotune.failures import classify, one_line
from llmmed.autotune.gpu_state import damage_of, has_room, memory_of, prepare
from llmmed.autotune.journal import (
    LAST_MATCH,
    Begun,
    CeilingsFound,
    Done,
    Job,
    JournalWriter,
    Judged,
    Launched,
    StepDone,
    StepExpected,
    StepTask,
    Task,
    Timed,
    Tried,
)
from llmmed.autotune.launch_search import check_launches, gate_at, search_launches
from llmmed.autotune.measure import Pass, compiled_alone, measure_ceilings, measure_op, take_turns
from llmmed.autotune.plan import Candidate, Ceilings, Mode, StepTrial, launches_of
from llmmed.autotune.process_settings import offer_to_out_of_memory_killer, take_settings
from llmmed.autotune.step_clock import StepClock
from llmmed.autotune.step_plan import release
from llmmed.autotune.verify import Verdict, forget, verify
from llmmed.compose import accumulation_steps, from_dict
from llmmed.config import Config
from llmmed.kernels.base import Call, Op, Unavailable
from llmmed.kernels.catalog import DEFAULT, get_implementation, get_op, load_function, take_launches
from llmmed.kernels.operator import INTERPRETED, as_in_compiled_step
from llmmed.kernels.tunable import Launches, Site
from llmmed.processes import end_with_parent

_SECOND_LOOKS = 0.4  # of the budget: until then, flips that were close are tried again once the plan has changed
_POLL_SECONDS = 0.05
_SECONDS_A_LAUNCH = {"cuda": 0.03, "cpu": 0.2}  # of timed passes


def main() -> None:
    path = Path(sys.argv[1])
    job = Job.read(path)
    end_with_parent()
    offer_to_out_of_memory_killer()
    take_settings(job)
    if job.warm is not None and Board(job.warm).is_awaited():
        prepare(job.device)
    _settle()
    started = time.time() - path.stat().st_mtime  # seconds ago, most of which PyTorch took
    job = job.model_copy(update={"seconds": job.seconds - started})
    with JournalWriter(job.journal) as journal:
        Worker(job, journal).run()
    os._exit(0)  # at once: what a candidate left behind, say a thread, must not hold the process


class Worker:
    """Works through a job."""

    def __init__(self, job: Job, journal: JournalWriter) -> None:
        self._journal = journal
        self._tasks = job.tasks
        self._device = torch.device(job.device)
        self._mode: Mode = job.mode
        self._deterministic = job.deterministic
        self._ceilings = job.ceilings
        self._step = job.step
        self._deadline = time.perf_counter() + job.seconds
        self._searching_left = job.searching_seconds
        self._board = Board(job.warm) if job.warm is not None else None
        self._searches_left = 0
        self._known = {op: dict(found) for op, found in job.step.known.items()} if job.step else {}

    def run(self) -> None:
        passed = {task.op: dict(task.verified) for task in self._tasks}
        for task in self._as_compiled([task for task in self._tasks if task.verify]):
            op, calls = get_op(task.op), task.counts()
            for name in task.verify:
                candidate = self._verify(op, name, calls, task.cases(name))
                if candidate.status == "verified":
                    passed[task.op][name] = candidate
            forget()
        self._wait_while(self._compilers_are_at)  # before any time is taken
        if self._device.type == "cuda" and self._ceilings is None and any(task.measure for task in self._tasks):
            self._ceilings = self._measure_ceilings()
        self._searches_left = sum(len(_unsearched(task, passed[task.op])) for task in self._tasks)
        for task in self._tasks:
            op, calls, found = get_op(task.op), task.counts(), passed[task.op]
            with as_in_compiled_step(self._mode != "eager"):
                for name in [name for name in found if name not in task.launched]:
                    found[name] = self._find_launches(op, name, found[name], calls, task)
                if task.measure and found:
                    self._measure(op, found, calls)
            _settle()
        if self._step is not None:
            self._confirm(self._step)
        self._journal.write(Done())

    def _as_compiled(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """In their order, but of the ops that are up for choice the first that is compiled: none waits for another's
        compilation. Those that were asked for come before, since the run cannot begin without them."""
        left = list(tasks)
        while left:
            few = left if left[0].measure else left[:1]
            room = has_room(self._device)
            self._wait_while(functools.partial(self._none_is_compiled, few) if room else self._compilers_are_at)
            task = next(task for task in few if not self._compilers_are_at(task.op))
            left.remove(task)
            yield task

    def _none_is_compiled(self, tasks: Sequence[Task]) -> bool:
        return self._compilers_are_at(ALL) or all(self._compilers_are_at(task.op) for task in tasks)

    def _compilers_are_at(self, *units: str) -> bool:
        """Whether those who compile ahead are still at any of these units, or at any: they would be compiled twice, and
        what runs on the GPU beside would spoil times."""
        return self._board is not None and self._board.is_awaited(*units)

    def _wait_while(self, condition: Callable[[], bool]) -> None:
        if not condition():
            return
        self._journal.write(Begun(stage="warm"))
        while condition():
            time.sleep(_POLL_SECONDS)

    def _measure_ceilings(self) -> Ceilings | None:
        self._journal.write(Begun(stage="ceilings"))
        ceilings = measure_ceilings(self._device, _product_dtypes(self._tasks))
        self._journal.write(CeilingsFound(ceilings=ceilings))
        return ceilings

    def _verify(self, op: Op, name: str, calls: Mapping[Call, int], cases: Collection[str] | None) -> Candidate:
        self._journal.write(Begun(stage="verify", op=op.name, name=name))
        try:
            implementation = get_implementation(op.name, name)
            function = load_function(op.name, implementation)
        except Unavailable as error:
            candidate = Candidate(status="unavailable", reason=str(error))
        except Exception as error:  # noqa: BLE001 - whatever a candidate raises rejects that candidate alone
            candidate = Candidate(status="crashed", reason=f"raised while it was loaded: {one_line(error)}")
        else:
            verdict = verify(
                op, implementation, function, calls, self._device, deterministic=self._deterministic, cases=cases
            )
            candidate = _as_candidate(verdict)
        self._conclude(op.name, name, candidate)
        return candidate

    def _find_launches(
        self, op: Op, name: str, candidate: Candidate, calls: Mapping[Call, int], task: Task
    ) -> Candidate:
        """A verified candidate with how its kernels are launched: as somebody's plan says, or else by a search."""
        implementation, device = get_implementation(op.name, name), self._device
        if not _can_be_searched(op.name, name):
            return candidate
        function = load_function(op.name, implementation)
        begun = Begun(stage="launch", op=op.name, name=name)
        self._journal.write(begun)
        started = time.perf_counter()

        def gate(calls: Sequence[Call], launches: Launches, site: Site) -> str:
            reason = gate_at(
                op, implementation, function, calls, launches, site, device=device, deterministic=self._deterministic
            )
            self._end_if_damaged(op.name, name)
            return reason

        def times(
            call: Call, functions: Mapping[str, Callable[..., Any]], failed: Callable[[str, Exception], None]
        ) -> dict[str, list[Pass]]:
            def told(variant: str, error: Exception) -> None:
                self._end_if_damaged(op.name, name)
                failed(variant, error)

            self._journal.write(begun)
            seconds = _SECONDS_A_LAUNCH[device.type]
            return take_turns(
                op, call, functions, device=device, mode=self._mode, seconds=seconds, turn=lambda variant: None,
                failed=told,
            )  # fmt: skip

        given = task.launches.get(name)
        share = self._searching_left / max(1, self._searches_left)  # what one leaves is for those that follow

        def time_is_up() -> bool:
            return time.perf_counter() - started > share

        try:
            if given is not None:
                found = check_launches(op, implementation, function, calls, given, device=device, gate=gate)
            else:
                found = search_launches(
                    op, implementation, function, calls, device=device, times=times, gate=gate, time_is_up=time_is_up
                )
        except Exception as error:  # noqa: BLE001 - as it is launched by default, it has passed
            self._end_if_damaged(op.name, name)
            print(f"{op.name}.{name} keeps its default launches: {one_line(error)}", file=sys.stderr, flush=True)
            implementation.take_launches({})
            found = []
        if given is None:
            self._searching_left = max(0.0, self._searching_left - (time.perf_counter() - started))
            self._searches_left -= 1
        self._journal.write(Launched(op=op.name, name=name, launches=found))
        forget()
        release(device)
        candidate = candidate.model_copy(update={"launches": found})
        self._known.setdefault(op.name, {})[name] = candidate
        return candidate

    def _measure(self, op: Op, passed: dict[str, Candidate], calls: Mapping[Call, int]) -> None:
        functions: dict[str, Callable[..., Any]] = {}
        for name in sorted(passed, key=lambda name: (name != DEFAULT, name)):
            self._journal.write(Begun(stage="load", op=op.name, name=name))
            implementation = get_implementation(op.name, name)
            function = load_function(op.name, implementation)
            take_launches(op.name, implementation, passed[name].launch_values)
            compiled = compiled_alone(implementation, self._mode)
            functions[name] = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function

        def failed(name: str, error: Exception) -> None:
            status, reason = classify(error)
            rejected = passed.pop(name).model_copy(update={"status": status, "reason": f"{reason}, while measured"})
            self._conclude(op.name, name, rejected)

        measurements = measure_op(
            op,
            functions,
            calls,
            device=self._device,
            mode=self._mode,
            ceilings=self._ceilings,
            turn=lambda name: self._journal.write(Begun(stage="measure", op=op.name, name=name)),
            failed=failed,
        )
        timed = {name: passed[name].model_copy(update=asdict(found)) for name, found in measurements.items()}
        self._journal.write(Timed(op=op.name, candidates=timed))
        self._known.setdefault(op.name, {}).update(timed)
        release(self._device)

    def _confirm(self, task: StepTask) -> None:
        """Lets the step decide between what passed the gate. Without a choice to make, says nothing."""
        config = from_dict(task.config)
        kernels = config.kernels
        open_ops = {op: found for op, found in self._known.items() if op not in task.pinned and DEFAULT in found}
        chosen = {op: choose(op, found, kernels.margin).chosen for op, found in open_ops.items()}
        usable = {op: found[DEFAULT].status == "verified" for op, found in open_ops.items()}
        base = {op: DEFAULT if usable[op] else chosen[op] for op in open_ops}
        base |= {op: name if self._passed(op, name) else DEFAULT for op, name in task.pinned.items()}
        scarce = kernels.objective == "memory" or kernels.memory_budget_gib is not None
        flips = shortlist(base, open_ops, everything=scarce)
        if not flips:
            return

        def told(trial: StepTrial) -> None:
            self._journal.write(Tried(trial=trial))
            if trial.status == "failed":
                self._end_if_damaged(trial.op, trial.name)

        open_modes: tuple[Mode, ...] = ("graphs", "compiled", "eager")
        leaves_open = config.train.compile == "auto" and self._device.type == "cuda"
        left: list[Mode] = [mode for mode in open_modes if mode != self._mode] if leaves_open else []
        second_looks_end = self._deadline - (1 - _SECOND_LOOKS) * kernels.budget_seconds
        reason = ""
        for mode in [self._mode, *left]:  # the next only where not even the default plan runs in the one before
            self._journal.write(Begun(stage="step"))
            clock = _Announcing(config, mode, launches_of(self._known), self._journal)
            try:
                confirm(
                    clock,
                    base,
                    flips,
                    mode=mode,
                    other_modes=[other for other in left if other != mode],
                    objective=kernels.objective,
                    margin=kernels.margin,
                    memory_budget_gib=kernels.memory_budget_gib or memory_of(self._device),
                    before=task.trials,
                    told=told,
                    expected=lambda evidence: self._journal.write(StepExpected(evidence=evidence)),
                    answered=lambda evidence, reason=reason: self._journal.write(  # type: ignore[misc]
                        StepDone(evidence=evidence, reason=reason)
                    ),
                    last_match_died=task.last_match_died,
                    micro_batches=accumulation_steps(config.train),
                    time_for_second_looks=lambda: time.perf_counter() < second_looks_end,
                    time_is_up=lambda clock=clock: time.perf_counter() + clock.reserve > self._deadline,  # type: ignore[misc]
                )
            except Failed as failure:
                reason = reason or f"{mode}: {failure}"
                continue
            return
        self._journal.write(StepDone(evidence=None, reason=reason))

    def _passed(self, op: str, name: str) -> bool:
        found = self._known.get(op, {}).get(name)
        return found is not None and found.status == "verified"

    def _conclude(self, op: str, name: str, candidate: Candidate) -> None:
        """Journals a verdict. Ends the process if the candidate has left the GPU unusable to those that follow."""
        damage = damage_of(self._device)
        if damage is not None and candidate.status in ("verified", "wrong", "no_backward"):
            candidate = Candidate(status="crashed", reason=f"left the GPU in error: {damage}")
        self._journal.write(Judged(op=op, name=name, candidate=candidate))
        self._known.setdefault(op, {})[name] = candidate
        self._end_if_damaged(op, name)
        release(self._device)

    def _end_if_damaged(self, op: str, name: str) -> None:
        """Ends the process if the GPU is in a state of error, in which nothing that follows could run."""
        if (damage := damage_of(self._device)) is not None:
            print(f"ending after {op}.{name}: {damage}", file=sys.stderr, flush=True)
            os._exit(1)


class _Announcing(StepClock):
    """Journals what is about to be tried in the step, so that the parent knows what a process died of.

    `reserve` is what a trial and the last match of whole plans take, in seconds, as far as that is known.
    """

    def __init__(
        self, config: Config, mode: Mode, launches: Mapping[str, Mapping[str, Launches]], journal: JournalWriter
    ) -> None:
        super().__init__(config, mode, launches)
        self._journal = journal
        self._longest = {"duel": 3.0, "whole": 3.0}

    @property
    def reserve(self) -> float:
        return sum(self._longest.values())

    def duel(self, champion: Choice, op: str, name: str) -> Duel:
        self._journal.write(Begun(stage="step", op=op, name=name))
        with self._taking_time("duel"):
            return super().duel(champion, op, name)

    def whole(self, choice: Choice, other: Choice, mode: Mode | None = None, *, loss_is_enough: bool = False) -> Match:
        name = mode or ("" if choice == other else LAST_MATCH)
        self._journal.write(Begun(stage="step", name=name))
        with self._taking_time("whole"):
            return super().whole(choice, other, mode, loss_is_enough=loss_is_enough)

    @contextlib.contextmanager
    def _taking_time(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._longest[what] = max(self._longest[what], time.perf_counter() - started)


def _can_be_searched(op: str, name: str) -> bool:
    return bool(get_implementation(op, name).tunable) and not INTERPRETED


def _unsearched(task: Task, passed: Mapping[str, Candidate]) -> list[str]:
    """The implementations whose launches are to be searched."""
    left = [name for name in passed if name not in task.launched and name not in task.launches]
    return [name for name in left if _can_be_searched(task.op, name)]


def _as_candidate(verdict: Verdict) -> Candidate:
    error, ratio = verdict.relative_error, verdict.worst_ratio
    return Candidate(
        status=verdict.status,
        reason=verdict.reason,
        relative_error=error if error is not None and math.isfinite(error) else None,
        worst_ratio=ratio if ratio is not None and math.isfinite(ratio) else None,
    )


def _product_dtypes(tasks: list[Task]) -> list[torch.dtype]:
    """The compute dtypes of the calls whose arithmetic counts, for the ceiling of products."""
    found: dict[torch.dtype, None] = {}
    for task in tasks:
        op = get_op(task.op)
        for call in task.counts():
            cost = op.cost(call)
            if cost.forward_flops or cost.backward_flops:
                found[call.compute_dtype] = None
    return list(found)


def _settle() -> None:
    """Takes what is there for good, a third of a million objects of PyTorch's, out of every later search for garbage,
    which it would make 0.2 s long."""
    gc.collect()
    gc.freeze()
