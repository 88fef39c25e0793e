"""Weights & Biases as a sink: offline by default, never in the way. What fails is one warning, and the run goes on.

Every call to W&B runs in a thread of its own with a time limit: a server that does not answer holds up nothing.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmmed.autotune.plan import KernelPlan
from llmmed.config import Config
from llmmed.files import read_json, write_json
from llmmed.reporting import plan_shares
from llmmed.training.metrics import Sample

logger = logging.getLogger(__name__)

_LEAST_FINISH_SECONDS = 5.0  # for a run that was told to stop, and must
_MOST_WAITING = 10_000  # log entries; beyond it W&B is stuck, and they are dropped


PLAN_COLUMNS = (
    "op", "calls a micro-batch", "implementation", "chosen", "verdict", "relative error", "error / allowed",
    "forward ms", "backward ms", "total ms", "peak memory MiB", "speed-up over pytorch", "reason",
)  # fmt: skip


def plan_rows(plan: KernelPlan) -> list[list[object]]:
    """The kernel table, a row a candidate, with `PLAN_COLUMNS`."""
    return [
        [name, sum(call.count for call in op.calls), implementation, implementation == op.chosen, c.status,
         c.relative_error, c.worst_ratio, c.forward_ms, c.backward_ms, c.total_ms, c.peak_memory_mib, c.speedup,
         c.reason]
        for name, op in plan.ops.items()
        for implementation, c in op.candidates.items()
    ]  # fmt: skip


class WandbSink:
    """Metrics and summary of one run. Use `open_wandb`."""

    def __init__(self, run: Any, timeout_seconds: float) -> None:
        self._run, self._timeout_seconds = run, timeout_seconds
        self._plan: Path | None = None
        self._waiting: queue.Queue[Callable[[], object] | None] = queue.Queue(maxsize=_MOST_WAITING)
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log_plan(self, plan: KernelPlan, path: Path) -> None:
        """The kernel table, where the step's time goes, the choice in the summary; `path` is kept at the end.

        Args:
            plan: As chosen.
            path: Its `kernels.json`. Training adds to it what was seen to run, so the last version is the one to keep.
        """
        self._plan = path
        parts = plan_shares.of_chosen(plan)
        times = [[f"{part.op} ({part.implementation})", part.ms] for part in parts.parts]
        if parts.rest_ms is not None:
            times.append([plan_shares.REST, parts.rest_ms])

        def send() -> None:
            import wandb

            entry: dict[str, object] = {"kernel_table": wandb.Table(columns=list(PLAN_COLUMNS), data=plan_rows(plan))}
            if times:
                unit, title = f"ms a {parts.whole}", "Where the step's time goes"
                bars = wandb.Table(columns=["part of the step", unit], data=times)
                entry["step_breakdown"] = wandb.plot.bar(bars, "part of the step", unit, title)
            self._run.log(entry, commit=False)  # with the first step's metrics, wherever a resumed run begins
            self._run.summary.update(plan.summary())

        self._put(send)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        values = dict(metrics)
        self._put(lambda: self._run.log(values, step=step))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        rows = [[sample.prompt, sample.text] for sample in samples]

        def send() -> None:
            import wandb

            self._run.log({"samples": wandb.Table(columns=["prompt", "text"], data=rows)}, step=step)

        self._put(send)

    def finish(self, summary: Mapping[str, object], status: str) -> None:
        """Writes the summary and ends the W&B run; waits for `logger.timeout_seconds` at most."""
        values = {**summary, "status": status}
        self._put(lambda: self._run.summary.update(values))
        if self._plan is not None:
            self._put(self._keep_plan)
        self._put(lambda: self._run.finish(exit_code=0 if status == "finished" else 1))
        self._put(None)
        limit = self._timeout_seconds
        if status == "interrupted":
            limit = min(limit, _LEAST_FINISH_SECONDS)
        self._thread.join(limit)
        if self._thread.is_alive():
            logger.warning("W&B did not finish within %g s; the run folder has everything", limit)

    def _keep_plan(self) -> None:
        """`kernels.json` as an artifact. The file does not change any more, so W&B need not copy it elsewhere."""
        import wandb

        artifact = wandb.Artifact(f"kernels-{self._run.id}", type="kernel-plan")
        artifact.add_file(str(self._plan), name="kernels.json", policy="immutable")
        self._run.log_artifact(artifact)

    def _put(self, action: Callable[[], object] | None) -> None:
        try:
            self._waiting.put_nowait(action)
        except queue.Full:
            self._give_up("it takes no more entries")

    def _work(self) -> None:
        while (action := self._waiting.get()) is not None:
            if self._failed:
                continue
            try:
                action()
            except Exception as error:  # noqa: BLE001 - W&B is a sink: whatever it raises must not end the run
                self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("W&B failed (%s); the run goes on without it, and the run folder has everything", reason)


def open_wandb(config: Config, folder: Path, values: dict[str, Any]) -> WandbSink | None:
    """Starts a W&B run with files under `folder/wandb`, or returns None: switched off, not installed, or not to be had.

    Args:
        config: The run's.
        folder: The run folder. A resumed run continues under the W&B id that it had.
        values: The whole configuration, for W&B to show.
    """
    wanted = config.logger
    if wanted.mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        logger.warning("W&B is not used: %s (pip install wandb, or logger=none)", error)
        return None
    identity = folder / "wandb" / "id.json"
    settings = wandb.Settings(silent=True, console="off", init_timeout=wanted.timeout_seconds, x_disable_stats=True)
    found: list[Any] = []

    def start() -> None:
        try:
            found.append(
                wandb.init(
                    project=wanted.project,
                    entity=wanted.entity,
                    group=wanted.group,
                    tags=wanted.tags,
                    mode=wanted.mode,
                    dir=str(folder),
                    config=values,
                    name=folder.name,
                    settings=settings,
                    id=_known_id(identity),
                    resume="allow" if config.train.resume and wanted.mode == "online" else None,
                )
            )
        except Exception as error:  # noqa: BLE001 - W&B is a sink: whatever it raises must not end the run
            found.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(wanted.timeout_seconds)
    outcome = found[0] if found else TimeoutError(f"no answer within logger.timeout_seconds={wanted.timeout_seconds:g}")
    if isinstance(outcome, Exception):
        logger.warning("W&B is not used: %s; the run folder has everything", " ".join(str(outcome).split()))
        return None
    write_json(identity, {"id": outcome.id})
    return WandbSink(outcome, wanted.timeout_seconds)


def _known_id(path: Path) -> str | None:
    try:
        identity = read_json(path)["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return identity if isinstance(identity, str) else None
