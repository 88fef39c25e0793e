"""The command behind `scripts/train.py`: one run, or with `-m` a sweep whose jobs each run in a process of their own.

A mistake is one line and exit code 1. What is not the user's mistake leaves its traceback in the run's `train.log`.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import hydra
import omegaconf
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from llmmed import compose, micro_batch, run_folder
from llmmed.errors import UserError
from llmmed.files import write_atomically
from llmmed.signals import INTERRUPTED, Interrupted, StopRequest

_STARTED = time.perf_counter()


@dataclass(frozen=True)
class _Job:
    name: str
    folder: Path
    sweep: Path  # the folder of the whole
    outcome: str  # finished, skipped, or why it failed
    failed: bool


_jobs: list[_Job] = []  # of this process's sweep, in the order they ran


def main() -> None:
    """Composes, validates and runs what `sys.argv` asks for; exits with 1 if anything failed."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach this function, which tells them in one line
    try:
        compose.register()
        if _is_single_run():
            _validate_early()
            # From before there is a folder, so that there is never one that does not say what became of its run.
            with StopRequest(give_up=_tell_interrupted) as stop:
                stop.waits = True
                _hydra_main(stop)
        else:
            _hydra_main(StopRequest())
    except UserError as error:
        _exit(str(error))
    except (HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        _exit(compose.explain(error))
    except OSError as error:
        _exit(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        if _jobs:
            _compare_jobs()
        sys.exit(INTERRUPTED)
    if _jobs:
        _tell_sweep()


def _hydra_main(stop: StopRequest) -> None:
    def task(composed: DictConfig) -> None:
        _task(composed, stop)

    hydra.main(version_base="1.3", config_path=str(compose.config_folder()), config_name=compose.CONFIG_NAME)(task)()


def _is_single_run() -> bool:
    arguments = get_args_parser().parse_args()
    others = ("multirun", "help", "hydra_help", "cfg", "info", "shell_completion", "config_dir", "config_name")
    return not any(getattr(arguments, name, None) for name in others)


def _validate_early() -> None:
    """Refuses a mistaken run before Hydra makes its folder, and sends a resumed one to the folder it had."""
    arguments = get_args_parser().parse_args()
    composed = compose.compose_yaml(arguments.overrides)
    config = compose.validate(composed, arguments.overrides)
    folder = run_folder.to_resume(config, Path("outputs"))
    if folder is not None:
        sys.argv.append(f"hydra.run.dir={_quoted(folder)}")


def _task(composed: DictConfig, stop: StopRequest) -> None:
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        _jobs.append(_run_job(composed, folder, hydra_config))
        return
    try:
        stop.wait_no_more()
        code = _run(composed, folder, list(hydra_config.overrides.task), stop)
    except Interrupted as interruption:  # before `run` took over
        stop.settle()
        _tell_interrupted(str(interruption))
        code = INTERRUPTED
    except UserError as error:
        run_folder.write_status(folder, "failed", reason=str(error))
        raise
    _leave(code)


def _run(composed: DictConfig, folder: Path, overrides: list[str], stop: StopRequest) -> int:
    composed = micro_batch.resolve(composed, overrides, folder, report=lambda line: print(line, flush=True))
    config = compose.validate(composed, overrides)
    write_atomically(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(composed, resolve=True))
    from llmmed.run import run  # torch comes with it, and is not needed to refuse a mistake

    return run(config, folder, started=_STARTED, stop=stop)


def _tell_interrupted(reason: str) -> None:
    """Of a run that did not come to the point where it tells that itself."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if run_folder.read_status(folder).state != "finished":
        run_folder.write_status(folder, "interrupted", reason=reason)
    print(f"interrupted: {reason}; go on with train.resume={run_folder.shown(folder)}", file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """Ends the process without the exit handlers of libraries: W&B's waits for a server or a service that is gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_job(composed: DictConfig, folder: Path, hydra_config: HydraConf) -> _Job:
    """Runs one job of a sweep in a child process, unless it is finished already. Never raises for what it does."""
    overrides = list(hydra_config.overrides.task)
    name = hydra_config.job.override_dirname or "no overrides"
    sweep = Path(hydra_config.sweep.dir)
    if run_folder.read_status(folder).state == "finished":
        print(f"\njob {hydra_config.job.num}: {name}: finished before, skipped", flush=True)
        return _Job(name, folder, sweep, "skipped", failed=False)
    print(f"\njob {hydra_config.job.num}: {name}", flush=True)
    try:
        compose.validate(composed, overrides)
    except UserError as error:
        run_folder.write_status(folder, "failed", reason=str(error))
        return _Job(name, folder, sweep, str(error), failed=True)
    own = [o for o in hydra_config.overrides.hydra if not o.startswith(("hydra.mode", "hydra.sweep", "hydra/launcher"))]
    command = [sys.executable, "-m", "llmmed.cli", *overrides, *own, f"hydra.run.dir={_quoted(folder)}"]
    code = _wait(subprocess.Popen(command))
    if code == 0:
        return _Job(name, folder, sweep, "finished", failed=False)
    status = run_folder.read_status(folder)
    if status.state not in ("failed", "interrupted"):
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        run_folder.write_status(folder, "failed", reason=reason)
        status = run_folder.read_status(folder)
    job = _Job(name, folder, sweep, status.reason or status.state, failed=True)
    if code == INTERRUPTED:
        _jobs.append(job)
        raise KeyboardInterrupt
    return job


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Ctrl-C reaches the child too, SIGTERM is passed on; it is given the time to write its checkpoint."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    try:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell_sweep() -> None:
    """The comparison of all jobs, on the terminal and in the sweep's folder; exit code 1 if any failed."""
    _compare_jobs()
    failed = [job for job in _jobs if job.failed]
    if failed:
        _exit("; ".join(f"{job.name} failed: {job.outcome}" for job in failed))


def _compare_jobs() -> None:
    from rich.console import Console

    from llmmed.reporting import sweep_summary  # torch comes with it

    try:
        sweep_summary.tell(_jobs[0].sweep, Console(highlight=False))
    except OSError as error:
        print(f"warning: the comparison cannot be written: {error}", file=sys.stderr)


def _quoted(folder: Path) -> str:
    """A path as a value of Hydra's override grammar, whatever characters are in it."""
    escaped = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _exit(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
