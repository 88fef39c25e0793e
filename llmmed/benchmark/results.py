"""What a benchmark leaves on disk: `ops.json` or `step.json`, whole, and the same rows as CSV.

Plots and pages are made from the JSON alone. Times are in ms, memory in MiB or GiB as the name says.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmmed.autotune.plan import Ceilings, Hardware, Mode, Status, first_problem
from llmmed.errors import UserError
from llmmed.files import write_atomically, write_json
from llmmed.machine import installed_version

PEERS = ("liger-kernel", "transformers")  # packages whose versions matter beside torch and triton


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Origin(_Frozen):
    """Where, when and how the numbers came about."""

    date: str  # UTC, ISO 8601
    command: str
    commit: str | None
    changed_files: int
    hardware: Hardware
    packages: dict[str, str | None]
    config: dict[str, Any]  # resolved
    remark: str = ""  # of whoever publishes it: what a reader has to know of this run


class OpRow(_Frozen):
    """One implementation of one op at one size: one call of each of the model's distinct shapes, forward + backward."""

    op: str
    size: str
    shapes: str
    dtype: str
    mode: Mode
    implementation: str
    status: Status
    reason: str = ""
    relative_error: float | None = None
    forward_ms: float | None = None  # of the device
    backward_ms: float | None = None
    host_ms: float | None = None  # to issue the calls; None on a CPU and in mode graphs
    total_ms: float | None = None  # what a step pays: in eager mode the host's time where that is longer
    total_ms_low: float | None = None  # 95 % confidence interval of the median
    total_ms_high: float | None = None
    speedup: float | None = None  # PyTorch's total_ms / this one's
    speedup_low: float | None = None  # from the ends of both intervals: wider than 95 %
    speedup_high: float | None = None
    peak_memory_mib: float | None = None  # beyond the inputs; None on a CPU
    share_of_ceiling: float | None = None  # least possible device time / measured; None on a CPU
    least_ms: float | None = None  # the least traffic or arithmetic at the ceilings

    @property
    def on_gpu(self) -> bool:
        """Whether it was timed, on a GPU."""
        return self.peak_memory_mib is not None

    @property
    def device_ms(self) -> float | None:
        if self.forward_ms is None or self.backward_ms is None:
            return None
        return self.forward_ms + self.backward_ms


class OpsResult(_Frozen):
    """`ops.json`."""

    kind: Literal["ops"] = "ops"
    schema_version: Literal[1] = 1
    origin: Origin
    seconds: float
    ceilings: dict[str, Ceilings]  # by size, dtype and mode: each process measured its own
    rows: list[OpRow]


class StepRow(_Frozen):
    """One contestant at one size, over all its rounds."""

    contestant: str
    title: str
    size: str
    status: Status
    reason: str = ""
    rounds: int = 0
    tokens_per_second: float | None = None  # the median of the blocks, or of the medians of several rounds
    tokens_per_second_low: float | None = None  # 95 % confidence interval of the median
    tokens_per_second_high: float | None = None
    step_ms: float | None = None  # the median
    mfu: float | None = None
    peak_memory_gib: float | None = None  # allocated, from the model's creation on
    first_step_seconds: float | None = None  # from the start of the process, with empty compiler caches
    first_step_again_seconds: float | None = None  # the same in a later round, with the caches of the first
    first_loss: float | None = None  # nats a token, from the same weights and batch as everybody's
    first_gradient_norm: float | None = None
    last_loss: float | None = None  # of the last warm-up step, up to which all have made the same steps
    update_rms: float | None = None  # by how much these steps have changed the weights, root mean square
    device_ms: dict[str, float] | None = None  # of a step, by what it does
    largest_kernels: dict[str, float] | None = None  # ms of a step
    samples: list[float] = Field(default_factory=list)  # tokens/s of every block
    kernels: dict[str, str] | None = None  # the plan of ours


class StepShape(_Frozen):
    """What every contestant of a size trains."""

    size: str
    parameters: int
    batch: int  # sequences of a micro-batch
    seq_len: int
    micro_batches: int = 1  # of a step; files without it are read as of one
    vocabulary: int
    precision: str
    optimizer: str

    @property
    def tokens(self) -> str:
        """Those of a step: `32 x 1024 tokens`, or `32 x 1024 tokens x 4 micro-batches`."""
        accumulated = f" x {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        return f"{self.batch} x {self.seq_len} tokens{accumulated}"


class StepResult(_Frozen):
    """`step.json`."""

    kind: Literal["step"] = "step"
    schema_version: Literal[1] = 1
    origin: Origin
    seconds: float
    shapes: list[StepShape]
    rows: list[StepRow]


Result = OpsResult | StepResult
_R = TypeVar("_R", OpsResult, StepResult)


def origin(device: str, config: dict[str, Any], command: Sequence[str]) -> Origin:
    """Of a benchmark that is run by this process."""
    from llmmed.autotune.hardware import describe_hardware
    from llmmed.run_folder import describe_environment

    git = describe_environment()["git"]
    return Origin(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        # But for the run's own folder, which says nothing about it.
        command=shlex.join(["python", *(word for word in command if not word.startswith("hydra.run.dir="))]),
        commit=git["commit"],
        changed_files=len(git["changed_files"]),
        hardware=describe_hardware(device),
        packages={name: installed_version(name) for name in PEERS},
        config=config,
    )


_JSON_ALONE = {"samples", "largest_kernels"}  # what no line of a table has room for


def write(result: Result, folder: Path) -> None:
    """`<kind>.json` and `<kind>.csv`, each whole or not at all."""
    write_json(folder / f"{result.kind}.json", result.model_dump(mode="json"))
    text = io.StringIO()
    rows = [row.model_dump(mode="json", exclude=_JSON_ALONE) for row in result.rows]
    names = list(OpRow.model_fields if isinstance(result, OpsResult) else StepRow.model_fields)
    writer = csv.DictWriter(text, [name for name in names if name not in _JSON_ALONE])
    writer.writeheader()
    writer.writerows({key: _flat(value) for key, value in row.items()} for row in rows)
    write_atomically(folder / f"{result.kind}.csv", text.getvalue())


def read(folders: Sequence[Path]) -> Iterator[tuple[Path, Result]]:
    """The results that lie in folders. Raises `UserError` where there is none, or one that cannot be read."""
    for folder in folders:
        ops, step = folder / "ops.json", folder / "step.json"
        if not ops.exists() and not step.exists():
            raise UserError(f"report={folder}: there is no ops.json or step.json; give the folder of a benchmark")
        if ops.exists():
            yield ops, _read(ops, OpsResult)
        if step.exists():
            yield step, _read(step, StepResult)


def _read(path: Path, kind: type[_R]) -> _R:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path} is not the result of a benchmark: {first_problem(error)}") from None


def _flat(value: Any) -> Any:
    """What a cell of a CSV can hold."""
    return "; ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
