"""What the tuning process and its parent tell each other: a job goes down, a journal of events comes up.

The journal is JSON lines, flushed one by one. A candidate is named in it before it is tried, so that the parent knows
which one the process died of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from llmmed.autotune.plan import CallCount, Candidate, Ceilings, KernelLaunch, Mode, StepEvidence, StepTrial
from llmmed.autotune.workload import Workload
from llmmed.files import write_atomically
from llmmed.kernels.base import Call

Stage = Literal["warm", "verify", "launch", "load", "measure", "ceilings", "step"]
LAST_MATCH = "the plan that was left"  # against the default: as `Begun.name`, where no op is named


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Task(_Frozen):
    """What to do for one op. `verify` is still to be judged; `verified` has passed and waits to be measured.

    Those of `verify` that are in `at_own_calls` have passed the op's cases before: they are judged at the calls alone.
    `launches` are those of somebody's plan, by implementation, to be checked where others are searched; `launched` the
    implementations for which either is done.
    """

    op: str
    calls: list[CallCount]
    verify: list[str]
    verified: dict[str, Candidate] = Field(default_factory=dict)
    measure: bool
    launches: dict[str, list[KernelLaunch]] = Field(default_factory=dict)
    launched: list[str] = Field(default_factory=list)
    at_own_calls: list[str] = Field(default_factory=list)

    @classmethod
    def of(
        cls,
        op: str,
        calls: dict[Call, int],
        verify: list[str],
        *,
        measure: bool,
        launches: dict[str, list[KernelLaunch]] | None = None,
    ) -> Task:
        return cls(op=op, calls=call_counts(calls), verify=verify, measure=measure, launches=launches or {})

    def cases(self, name: str) -> tuple[()] | None:
        """The op's cases that an implementation is judged at: none of them, or None for all."""
        return () if name in self.at_own_calls else None

    def counts(self) -> dict[Call, int]:
        """The calls and how often a micro-batch makes each."""
        return dict(Workload.from_json({"calls": [call.model_dump() for call in self.calls]}).calls)


class StepTask(_Frozen):
    """What to confirm in the step, when all else is done.

    `config` is the run's as JSON, `pinned` the ops that are not up for choice, `known` the candidates as far as they
    are known, `trials` what processes before this one found, `last_match_died` what one of them died of when all
    trials were over, if one did.
    """

    config: dict[str, Any]
    pinned: dict[str, str]
    known: dict[str, dict[str, Candidate]]
    trials: list[StepTrial] = Field(default_factory=list)
    last_match_died: str = ""


class Job(_Frozen):
    """What one tuning process is to do, in order; of ops that are up for choice it verifies first what is compiled."""

    journal: Path
    device: Literal["cuda", "cpu"]
    mode: Mode
    deterministic: bool
    matmul_precision: str  # of float32 products, `torch.get_float32_matmul_precision()`: as the step will have it
    tasks: list[Task]
    ceilings: Ceilings | None = None  # measured already, by a process before this one
    step: StepTask | None = None
    seconds: float  # until tuning ends, from when the job is written
    searching_seconds: float = 5.0  # of those, for the search for launches
    warm: Path | None = None  # the folder of the processes that compile for it, if there are any

    def write(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json())

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


class Begun(_Frozen):
    """What is tried next; what it does to the process is its own doing. `ceilings` belong to no candidate, and neither
    does the default plan in the step. Of a whole plan in the step `name` is `LAST_MATCH`, or a mode."""

    event: Literal["begun"] = "begun"
    stage: Stage
    op: str = ""
    name: str = ""


class Judged(_Frozen):
    """A candidate's verdict: the gate's, or a later failure while it was measured."""

    event: Literal["judged"] = "judged"
    op: str
    name: str
    candidate: Candidate


class Launched(_Frozen):
    """How the kernels of a verified candidate are launched from now on."""

    event: Literal["launched"] = "launched"
    op: str
    name: str
    launches: list[KernelLaunch]


class Timed(_Frozen):
    """An op's measurement, all its candidates together: half of it would compare nothing."""

    event: Literal["timed"] = "timed"
    op: str
    candidates: dict[str, Candidate]


class CeilingsFound(_Frozen):
    event: Literal["ceilings"] = "ceilings"
    ceilings: Ceilings | None


class Tried(_Frozen):
    """A trial in the step."""

    event: Literal["tried"] = "tried"
    trial: StepTrial


class StepDone(_Frozen):
    """The step's answer. A later one takes the place of the first. `reason` says why the default does not run: in any
    mode, where there is no answer, else in the modes that were tried before."""

    event: Literal["step"] = "step"
    evidence: StepEvidence | None
    reason: str = ""


class StepExpected(_Frozen):
    """What the trials make of the step's answer, which is still to be found out."""

    event: Literal["expected"] = "expected"
    evidence: StepEvidence


class Done(_Frozen):
    """The job is done."""

    event: Literal["done"] = "done"


_AnyEvent = Begun | Judged | Launched | Timed | CeilingsFound | Tried | StepExpected | StepDone | Done
Event = Annotated[_AnyEvent, Field(discriminator="event")]
_EVENT: TypeAdapter[_AnyEvent] = TypeAdapter(Event)


class JournalWriter:
    """Appends events; each is with the operating system before `write` returns, so a dying process loses none."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: Event) -> None:
        self._file.write(event.model_dump_json() + "\n")
        self._file.flush()

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class JournalReader:
    """Gives every event once, as it arrives. A line that is not yet whole waits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> Iterator[Event]:
        """The events since the last call. A writer that has not yet started has written none."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            yield _EVENT.validate_json(line)


def call_counts(calls: dict[Call, int]) -> list[CallCount]:
    """The calls as a plan writes them, equal to those that it reads back."""
    entries = json.loads(json.dumps(Workload(calls).to_json()["calls"]))
    return [CallCount.model_validate(entry) for entry in entries]
