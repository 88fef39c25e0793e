"""A sweep: each of its jobs in a process of its own, whichever launcher runs them, and one comparison at the end.

A job that crashes the GPU or is killed ends that process alone. What happened is read from the job folders, never
carried in memory: jobs may have run on other machines, or in an earlier sweep into the same folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmmed import compose, run_folder
from llmmed.errors import UserError
from llmmed.files import read_json, write_atomically
from llmmed.gpus import own_gpu
from llmmed.signals import say

OUTPUT = "output.txt"  # what a job prints, where several print at once
_GRID_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_LOOKED_AT = 30  # jobs, 0.15 s each, for mistakes before the first one starts

_PLUGINS = {  # the module that an option of Hydra's groups needs, and what to install
    "hydra/launcher=joblib": ("hydra_plugins.hydra_joblib_launcher", "hydra-joblib-launcher"),
    "hydra/launcher=submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "'llmmed[slurm]'"),
    "hydra/launcher=submitit_local": ("hydra_plugins.hydra_submitit_launcher", "'llmmed[slurm]'"),
    "hydra/sweeper=optuna": ("hydra_plugins.hydra_optuna_sweeper", "'llmmed[sweep]'"),
}


class BeforeTheJobs(Callback):
    """Hydra calls it in the process that was started by hand, before the first job."""

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        BeforeTheJobs.folder = Path(config.hydra.sweep.dir)
        if config.hydra.runtime.choices["hydra/launcher"] in ("basic", "joblib"):  # others' machines may be different
            _tell_mistakes(jobs_of(config.hydra)[:_LOOKED_AT])


def _tell_mistakes(jobs: Sequence[Sequence[str]]) -> None:
    """Says which jobs will be refused. The others run: of a grid, some may be what nobody meant."""
    for number, (job, name) in enumerate(zip(jobs, names_of(jobs), strict=True)):
        try:
            compose.validate(hydra.compose(compose.CONFIG_NAME, list(job)), job)
        except UserError as error:
            say(f"job {number}: {name}: will be refused: {error}")
        except (HydraException, OmegaConfBaseException):
            return  # Hydra finds that, too


def names_of(jobs: Sequence[Sequence[str]]) -> list[str]:
    """What each job is called: its overrides that not all have, or all of them where it has no others."""
    common = set.intersection(*map(set, jobs)) if jobs else set()
    return [" ".join(o for o in job if o not in common) or " ".join(job) or "no overrides" for job in jobs]


def jobs_of(hydra_part: DictConfig) -> list[list[str]]:
    """The overrides of every job of a sweep, given Hydra's own part; none if another sweeper proposes them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if OmegaConf.select(hydra_part, "sweeper._target_") != _GRID_SWEEPER:
        return []
    overrides = [f"{key}={value}" for key, value in (hydra_part.sweeper.get("params") or {}).items()]
    overrides += map(str, hydra_part.overrides.task)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    except HydraException:
        return []


def plugin_overrides(overrides: Sequence[str]) -> list[str]:
    """What `configs/hydra/plugins.yaml` adds to a command line. Raises `UserError` if a plugin is not installed."""
    asked = [override for override in overrides if override in _PLUGINS]
    for override in asked:
        module, package = _PLUGINS[override]
        if not _installed(module):
            raise UserError(f"{override} is not installed here; pip install {package}")
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    ours = OmegaConf.to_container(OmegaConf.load(compose.config_folder() / "hydra" / "plugins.yaml"), resolve=False)
    assert isinstance(ours, dict)
    values = [(key, value) for override in asked for key, value in ours.get(override, {}).items()]
    return [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values if key not in given
    ]


def run_job(composed: DictConfig, folder: Path, hydra_config: HydraConf) -> float | None:
    """Runs one job of a sweep in a child process, unless it is finished already.

    Args:
        composed: The job's configuration, not validated.
        folder: The job's.
        hydra_config: Hydra's own part.

    Returns:
        The final validation loss, what an optimizing sweeper makes small; None if there is none.

    Raises:
        KeyboardInterrupt: Ctrl-C, once the job has ended. Nothing else: what went wrong stands in `status.json`.
    """
    label = f"job {hydra_config.job.num}: {hydra_config.job.override_dirname or 'no overrides'}"
    if run_folder.read_status(folder).state == "finished":
        say(f"\n{label}: finished before, skipped")
        return _validation_loss(folder)
    if (other := run_folder.holder(folder)) is not None:  # left over from a sweep that was killed
        say(f"\n{label}: {other} is training it, skipped")
        return None
    say(f"\n{label}")
    overrides = list(hydra_config.overrides.task)
    write_atomically(folder / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
    try:
        config = compose.validate(composed, overrides)
    except UserError as error:
        run_folder.write_status(folder, "failed", reason=str(error))
        say(f"{label}: failed: {error}")
        return None
    own = [o for o in hydra_config.overrides.hydra if not o.startswith(_OF_THE_SWEEP)]
    command = [sys.executable, "-m", "llmmed.cli", *overrides, *own, f"hydra.run.dir={compose.quoted(folder)}"]
    environment = {"WANDB_RUN_GROUP": config.logger.group or Path(hydra_config.sweep.dir).resolve().name}
    launcher = hydra_config.runtime.choices["hydra/launcher"]
    output = None if launcher == "basic" else folder / OUTPUT
    with own_gpu(wanted=launcher == "joblib" and config.device == "cuda") as gpu:
        code, stopped = _run(command, {**os.environ, **environment, **gpu}, output)
    loss = _outcome(code, folder, label)
    if stopped:
        raise KeyboardInterrupt
    return loss


_OF_THE_SWEEP = (
    "hydra.mode",
    "hydra.sweep",
    "hydra/launcher",
    "hydra.launcher",
    "hydra/sweeper",
    "hydra.output_subdir",
)


def _outcome(code: int, folder: Path, label: str) -> float | None:
    """Makes sure that the folder says how it ended."""
    status = run_folder.read_status(folder)
    if code and status.state not in ("failed", "interrupted"):
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        run_folder.write_status(folder, "failed", reason=reason)
        status = run_folder.read_status(folder)
    say(f"{label}: {status.state}{f': {status.reason}' if status.reason else ''}")
    return _validation_loss(folder) if code == 0 else None


def _run(command: Sequence[str], environment: Mapping[str, str], output: Path | None) -> tuple[int, bool]:
    """The exit code, and whether the sweep was asked to stop. Ctrl-C reaches the child too, SIGTERM is passed on; it
    has the time to end well. A child that somebody else stops ends alone, whatever its exit code.
    """
    stopped = threading.Event()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output.open("a", encoding="utf-8")) if output is not None else None
        child = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT if file else None)

        def pass_on(*_: object) -> None:
            stopped.set()
            child.terminate()

        if threading.current_thread() is threading.main_thread():  # a launcher may run jobs in others
            before = signal.signal(signal.SIGTERM, pass_on)
            stack.callback(signal.signal, signal.SIGTERM, before)
        while True:
            try:
                return child.wait(), stopped.is_set()
            except KeyboardInterrupt:
                stopped.set()


def tell(folder: Path) -> list[str]:
    """The comparison of all jobs, on the terminal and in the sweep's folder. Returns a line for each not finished."""
    from llmmed import consoles
    from llmmed.reporting import sweep_summary

    try:
        jobs = sweep_summary.tell(folder, consoles.output())
    except OSError as error:
        return [f"the comparison cannot be written: {error}"]
    return [f"{job.job} {job.status}: {job.reason or 'no reason is known'}" for job in jobs if job.status != "finished"]


def _validation_loss(folder: Path) -> float | None:
    try:
        loss = read_json(folder / "summary.json")["final/val_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
