"""Compiles the plans that the step will be asked about, while others verify and take times.

First the default plan, then those one flip away from the best so far, in the order in which the step will come to them
as far as that is known: what has been found out until now is in the tuning process's journal.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator

import torch

from llmmed.autotune.board import STEP, Board
from llmmed.autotune.compiled_ahead import PARTS, compile_ahead, compile_update_ahead
from llmmed.autotune.confirm import Choice, shortlist
from llmmed.autotune.failures import one_line
from llmmed.autotune.journal import Job, JournalReader, Judged, StepDone, Timed, Tried
from llmmed.autotune.plan import Candidate
from llmmed.compose import from_dict
from llmmed.files import sha256_of
from llmmed.kernels.catalog import DEFAULT

_NICER = 4  # than the rest of the warm-up
_MOST_PROCESSES = 8
_CONTEXTS = (0.03, 2**29)  # of the GPU's memory, which these processes may hold while others need it; bytes of each
_MEMORY = 0.02  # of the GPU's: what a process may allocate, which needs next to nothing
_POLL_SECONDS = 0.2


class StepAhead:
    """One process's share."""

    def __init__(self, job: Job, board: Board) -> None:
        assert job.step is not None
        self._board, self._device = board, torch.device(job.device)
        self._folder = job.journal.parent
        self._readers: dict[str, JournalReader] = {}
        self._config = from_dict(job.step.config)
        self._mode, self._pinned = job.mode, job.step.pinned
        self._untimed = {task.op: [*task.verify, *task.verified] for task in job.tasks if task.measure}
        self._known: dict[str, dict[str, Candidate]] = {op: dict(found) for op, found in job.step.known.items()}
        self._default = dict.fromkeys((*self._known, *self._untimed), DEFAULT) | job.step.pinned
        self._best = dict(self._default)

    def compile_default(self) -> bool:
        """Compiles a part of the default plan, or the update that it shares with all. Returns whether there was one
        that no other process does."""
        for part in range(PARTS):
            if self._board.claim(f"{STEP}-default-{part}"):
                self._compile(self._default, f"the default plan, part {part + 1} of {PARTS}", [part])
                return True
        if self._board.claim(f"{STEP}-update"):
            self._do(lambda: compile_update_ahead(self._config, self._mode), "the optimizer's update")
            return True
        return False

    def compile_flips(self) -> None:
        """Goes on until the step has answered. Only as many processes take part as the GPU's memory allows."""
        if not any(self._board.claim(f"{STEP}{n}") for n in range(most_processes(self._device))):
            return
        os.nice(_NICER)
        while not self._step_has_answered():
            if self.compile_default():
                continue
            # What the flips share with the default plan is compiled once.
            wanted = self._wanted() if len(self._board.finished(STEP)) > PARTS else ()  # and the update
            plan = next((each for each in wanted if self._board.claim(_name(each))), None)
            if plan is None:
                time.sleep(_POLL_SECONDS)
                continue
            flips = [f"{op}={name}" for op, name in plan.items() if name != self._default[op]]
            self._compile(plan, ", ".join(flips), range(PARTS))

    def _wanted(self) -> Iterator[Choice]:
        """Plans one flip from the best so far: first, of ops whose times are known, those that the step will be asked
        about; then those of all others that are not rejected."""
        kernels = self._config.kernels
        scarce = kernels.objective == "memory" or kernels.memory_budget_gib is not None
        found = {op: each for op, each in self._known.items() if op not in self._pinned and DEFAULT in each}
        usable = {op: each for op, each in found.items() if each[DEFAULT].status == "verified"}
        for flip in shortlist(self._default, usable, everything=scarce):
            yield {**self._best, flip.op: flip.name}
        for op, names in self._untimed.items():
            for name in names:
                verdict = self._known.get(op, {}).get(name)
                if name != DEFAULT and (verdict is None or verdict.status == "verified"):
                    yield {**self._best, op: name}

    def _step_has_answered(self) -> bool:
        """Learns what the tuning processes have found out."""
        for path in self._folder.glob("journal*.jsonl"):
            for event in self._readers.setdefault(path.name, JournalReader(path)).read():
                if isinstance(event, Judged):
                    self._known.setdefault(event.op, {})[event.name] = event.candidate
                elif isinstance(event, Timed):
                    self._known.setdefault(event.op, {}).update(event.candidates)
                    self._untimed.pop(event.op, None)
                elif isinstance(event, Tried) and event.trial.status == "accepted":
                    self._best[event.trial.op] = event.trial.name
                elif isinstance(event, StepDone):
                    return True
        return False

    def _compile(self, plan: Choice, what: str, parts: Collection[int]) -> None:
        self._do(lambda: compile_ahead(self._config, plan, self._mode, parts), what)

    def _do(self, compile_it: Callable[[], None], what: str) -> None:
        began, failure = time.perf_counter(), ""
        try:
            with little_memory(self._device):
                compile_it()
        except Exception as error:  # noqa: BLE001 - what does not compile is told where it is tried
            failure = f": {one_line(error)}"
        text = f"{time.perf_counter() - began:6.1f} {what}{failure}"
        self._board.finish(STEP, sha256_of([what])[:16], text)


def _name(plan: Choice) -> str:
    return f"{STEP}-{sha256_of(map(str, sorted(plan.items())))[:16]}"


def most_processes(device: torch.device) -> int:
    """How many may compile while others use the GPU: each holds a context of it."""
    if device.type != "cuda":
        return _MOST_PROCESSES
    share, each = _CONTEXTS
    total = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(_MOST_PROCESSES, int(share * total / each)))


@contextlib.contextmanager
def little_memory(device: torch.device) -> Iterator[None]:
    """Where this process may allocate next to nothing."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(_MEMORY, device.index)  # the current GPU where it has none
    try:
        yield
    finally:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)
