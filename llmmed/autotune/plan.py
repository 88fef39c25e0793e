"""The kernel plan, `kernels.json`: what was chosen for every op, the evidence, and where it was measured.

Frozen and validated: what reads a plan needs neither a GPU nor this machine. Times are those of one micro-batch, all
its calls of the op together, unless a field says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmmed.errors import UserError
from llmmed.files import write_json
from llmmed.kernels.catalog import implementation_names, no_such_implementation, op_names
from llmmed.kernels.tunable import Launches, Site

Mode = Literal["eager", "compiled", "graphs"]
Status = Literal[
    "verified",
    "unavailable",
    "wrong",
    "no_backward",
    "out_of_memory",
    "failed_to_compile",
    "crashed",
    "timed_out",
    "not_tried",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LaunchTrial(_Frozen):
    """One way to launch a kernel, and what the pass that it is part of took with it, at one call."""

    values: dict[str, int]
    ms: float | None = None  # None: it raised, or was not timed
    ms_low: float | None = None  # 95 % confidence interval of ms
    ms_high: float | None = None
    reason: str = ""  # why it is not used, where that is not the time


class KernelLaunch(_Frozen):
    """How a kernel is launched at one shape, found by a search. What was tried has the default first."""

    kernel: str
    at: dict[str, int]  # what the launch depends on
    chosen: dict[str, int]
    tried: list[LaunchTrial] = Field(default_factory=list)

    @property
    def site(self) -> Site:
        return Site(self.kernel, tuple(sorted(self.at.items())))


class Candidate(_Frozen):
    """One implementation of one op: the gate's verdict, then, if it was timed, what the clock and the memory say."""

    status: Status
    reason: str = ""
    relative_error: float | None = None  # the gate's; None if it never got that far or is not finite
    worst_ratio: float | None = None  # of an error to its bound: 1 is the limit
    forward_ms: float | None = None
    backward_ms: float | None = None
    total_ms: float | None = None  # what a micro-batch pays; in eager mode the host's time where that is longer
    total_ms_low: float | None = None  # 95 % confidence interval of total_ms
    total_ms_high: float | None = None
    host_ms: float | None = None  # to issue the calls, forward and backward; None on a CPU and in mode graphs
    peak_memory_mib: float | None = None  # extra, of the hungriest call, forward and backward; None on a CPU
    share_of_ceiling: float | None = None  # least possible device time / measured; None on a CPU
    speedup: float | None = None  # the default's total_ms / this one's
    launches: list[KernelLaunch] = Field(default_factory=list)  # empty: none searched, a plain function says how

    @property
    def launch_values(self) -> Launches:
        """For `Implementation.take_launches`."""
        return {launch.site: launch.chosen for launch in self.launches}

    @property
    def timed(self) -> bool:
        return self.total_ms is not None


class CallCount(_Frozen):
    """A call as `Call.to_json` writes it, and how often a micro-batch makes it."""

    op: str
    arguments: dict[str, Any]
    count: int = Field(gt=0)


class OpPlan(_Frozen):
    """What was chosen for one op, out of what, and why."""

    chosen: str
    reason: str
    calls: list[CallCount]
    candidates: dict[str, Candidate]
    source_sha256: str  # of the op's folder and of what other packages register for it

    @property
    def speedup(self) -> float | None:
        """The chosen implementation's over PyTorch's, if known: a plan written by hand may have no candidates."""
        chosen = self.candidates.get(self.chosen)
        return None if chosen is None else chosen.speedup


class StepTrial(_Frozen):
    """One implementation tried in the real step, in place of what the best plan so far had for its op.

    Gains are what the whole model's step saves, positive is better: measured at `StepEvidence.trial_depth` layers and
    scaled by how often the whole step calls the op.
    """

    op: str
    name: str
    against: str  # what it would replace
    status: Literal["accepted", "rejected", "failed"]
    reason: str
    gain_ms: float | None = None
    gain_ms_low: float | None = None  # 95 % confidence interval of the median of paired differences
    gain_ms_high: float | None = None
    memory_gain_mib: float | None = None  # None on a CPU


class StepTimes(_Frozen):
    """A plan in the real step, the whole model, measured or drawn on from `StepEvidence.depths`: ms of all its
    micro-batches and, where the optimizer has kernels to choose, of its update."""

    choice: dict[str, str]
    ms: float
    ms_low: float
    ms_high: float
    peak_memory_gib: float | None  # parameters, optimizer, gradients and activations; None on a CPU


class LastMatch(_Frozen):
    """The plan that the trials left, as a whole, in the real step, and what it saves of PyTorch's."""

    left: StepTimes
    gain_ms: float
    gain_ms_low: float  # 95 % confidence interval of the median of paired differences
    gain_ms_high: float


class StepEvidence(_Frozen):
    """What the real step said, forward, backward and, where kernels of the optimizer are chosen, its update.

    `default` is PyTorch's plan (with what is pinned), `chosen` the plan that stays; `last_match`, if it came to one, is
    between the first and the plan that the trials left. `modes` are the times of the
    chosen plan in other modes, where `train.compile=auto` leaves that open; `mode` is the one to train in. `depths` are
    the numbers of layers that whole plans were timed with: twice all of them, or two from which a line is drawn.
    `micro_batches` are those of a step, which its times count all.
    """

    trial_depth: int
    depths: tuple[int, int]
    trials: list[StepTrial]
    default: StepTimes
    chosen: StepTimes
    last_match: LastMatch | None = None
    reason: str
    mode: Mode
    modes: dict[Mode, float] = Field(default_factory=dict)
    memory_budget_gib: float | None = None
    micro_batches: int = Field(default=1, ge=1)
    finished: bool = True  # False: kernels.budget_seconds ended the trials


class Ceilings(_Frozen):
    """What the device reached on the spot: a copy kernel (read + write) and, where an op has products, a product."""

    copy_gb_per_second: float = Field(gt=0)
    product_tflops: dict[str, float] = Field(default_factory=dict)  # by dtype


class Hardware(_Frozen):
    """What times and verdicts depend on, all of it readable without a CUDA context."""

    device: str  # the GPU's name, or the CPU's
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    python: str
    cpu: str
    cpu_threads: int

    def computes_as(self, other: Hardware) -> bool:
        """Whether a step with the same kernels computes the same on both: with a GPU, whatever the host is."""
        host = set() if self.cuda is None else {"python", "cpu", "cpu_threads"}
        return self.model_dump(exclude=host) == other.model_dump(exclude=host)


class KernelPlan(_Frozen):
    """The whole plan, immutable once training starts."""

    schema_version: Literal[1] = 1
    policy: Literal["auto", "triton", "pytorch"]
    mode: Mode
    ops: dict[str, OpPlan]
    hardware: Hardware
    ceilings: Ceilings | None = None
    step: StepEvidence | None = None  # None: there was nothing to choose in the step, or no time for it
    executed: dict[str, str] | None = None  # what a trace of a training step says of each op; None: not traced
    workload_fingerprint: str
    cached: bool
    tuning_seconds: float = Field(ge=0)
    tuning_stages: dict[str, float] = Field(default_factory=dict)  # seconds by stage

    @property
    def choice(self) -> dict[str, str]:
        """Op -> implementation, for `catalog.load_kernels`."""
        return {name: op.chosen for name, op in self.ops.items()}

    @property
    def launches(self) -> dict[str, dict[str, Launches]]:
        """Op -> implementation -> how its kernels are launched, for `catalog.load_kernels`."""
        return launches_of({name: op.candidates for name, op in self.ops.items()})

    def summary(self) -> dict[str, str | float | bool]:
        """The plan's part of the W&B summary and of `summary.json`."""
        found: dict[str, str | float | bool] = {"execution_mode": self.mode}
        if self.step is not None:
            found["step_speedup"] = self.step.default.ms / self.step.chosen.ms
        for name, op in self.ops.items():
            found[f"kernels/{name}"] = op.chosen
            if op.speedup is not None:
                found[f"kernels/{name}/speedup"] = op.speedup
            found[f"use_triton_{_SUMMARY_NAMES.get(name, name)}"] = op.chosen.startswith("triton")
        return found

    def write(self, path: Path) -> None:
        """Writes `kernels.json`, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> KernelPlan:
        """Reads and validates. Raises `UserError` if the file is missing or is no plan."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the kernel plan {path} cannot be read: {error}; give a run's kernels.json") from None
        except ValidationError as error:
            raise UserError(f"{path} is not a kernel plan: {first_problem(error)}; give a run's kernels.json") from None

    @classmethod
    def read_stated(cls, setting: str, path: str) -> KernelPlan:
        """Reads the plan that a setting names. Raises `UserError` if it is none, or names what is not known."""
        plan = cls.read(Path(path))
        for op, name in plan.choice.items():
            if op not in op_names():
                raise UserError(f"{setting}={path}: there is no op '{op}'; the ops are {', '.join(op_names())}")
            if name not in implementation_names(op):
                raise UserError(f"{setting}={path}: {no_such_implementation(op, name)}")
        return plan

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KernelPlan:
        """From what `to_json` gave, for instance out of a checkpoint. Raises `pydantic.ValidationError`."""
        return cls.model_validate(data)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def launches_of(candidates: Mapping[str, Mapping[str, Candidate]]) -> dict[str, dict[str, Launches]]:
    """By op and implementation, where a search has found any."""
    return {op: {n: c.launch_values for n, c in found.items() if c.launches} for op, found in candidates.items()}


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints, in one line: where and what."""
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"]


_SUMMARY_NAMES = {"rms_norm": "rmsnorm"}  # the key that existing dashboards know
