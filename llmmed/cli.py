"""The command behind `scripts/train.py`: one run, or with `-m` a sweep, whose jobs `sweep` runs.

A mistake is one line and exit code 1. What is not the user's mistake leaves its traceback in the run's `train.log`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
import omegaconf
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from llmmed import collector, compose, continuation, micro_batch, run_folder, sweep
from llmmed.errors import UserError, in_words
from llmmed.files import write_atomically
from llmmed.signals import INTERRUPTED, Interrupted, StopRequest, say

_STARTED = time.perf_counter()


def main() -> None:
    """Composes, validates and runs what `sys.argv` asks for; exits with 1 if anything failed."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach this function, which tells them in one line
    early = None
    try:
        compose.register()
        begin = _prepare_arguments()
        if begin is not None:
            # From before there is a folder, so that there is never one that does not say what became of its run.
            with StopRequest(give_up=_tell_interrupted) as stop:
                stop.waits = True
                put_back = begin()
                _hydra_main(functools.partial(_task, stop=stop, put_back=put_back))
        else:
            _hydra_main(_job)
    except UserError as error:
        _exit(str(error))
    except (HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        _exit(compose.explain(error))
    except OSError as error:
        _exit(in_words(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        if sweep.BeforeTheJobs.folder is not None:
            sweep.tell(sweep.BeforeTheJobs.folder)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if sweep.BeforeTheJobs.folder is None:
            raise
        # A launcher's or a sweeper's, for instance because one of its own processes was killed.
        early = f"the sweep ended early: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if sweep.BeforeTheJobs.folder is not None:
        troubles = sweep.tell(sweep.BeforeTheJobs.folder)
        if early or troubles:
            _exit("; ".join([*([early] if early else []), *troubles]))


def _hydra_main(task: Callable[[DictConfig], float | None]) -> None:
    hydra.main(version_base="1.3", config_path=str(compose.config_folder()), config_name=compose.CONFIG_NAME)(task)()


def _prepare_arguments() -> Callable[[], Callable[[], None]] | None:
    """Refuses what is mistaken before there is a folder; gives a resumed run the overrides it had.

    Returns what takes the run's folder, and then returns what to call if the run fails; None for what is no single run
    but a sweep or a question to Hydra.
    """
    arguments = get_args_parser().parse_args()
    _add(sweep.plugin_overrides(arguments.overrides), arguments.overrides)
    if arguments.config_dir is not None:  # as an override it reaches what composes here, and the jobs of a sweep
        address = f"file://{Path(arguments.config_dir).absolute()}"
        searched = [f"hydra.searchpath=[{compose.quoted(address)}]"]
        _add(searched, arguments.overrides)
        arguments.overrides += searched
    if arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides:
        # Otherwise Hydra writes into the folders of finished jobs, too. Each job's own process writes its `.hydra`.
        _add(["hydra.output_subdir=null"], arguments.overrides)
        return None
    others = ("help", "hydra_help", "cfg", "info", "shell_completion")
    if any(getattr(arguments, name, None) for name in others):
        return None
    if arguments.config_name not in (None, compose.CONFIG_NAME):
        raise UserError(
            f"--config-name={arguments.config_name}: the configuration is {compose.CONFIG_NAME}; write what differs "
            f"into <folder>/experiment/<name>.yaml and give --config-dir=<folder> experiment=<name>"
        )
    earlier = run_folder.earlier_overrides(arguments.overrides)
    if earlier:
        place = sys.argv.index(arguments.overrides[0])
        sys.argv[place:place] = earlier
        arguments.overrides[:0] = earlier
    composed = compose.compose_yaml(arguments.overrides, with_hydra=True)
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    try:
        config = compose.validate(own, arguments.overrides, typed=arguments.overrides[len(earlier) :])
    except UserError as error:
        elsewhere = run_folder.started_elsewhere(arguments.overrides, earlier)
        raise UserError(f"{error}{f' (the run was started in {elsewhere})' if elsewhere else ''}") from error
    folder = run_folder.to_resume(config, Path("outputs"))
    if folder is not None:
        continuation.changes(folder, config)  # refused here, a mistake leaves the folder as it is
    return functools.partial(_take_folder, folder, composed.hydra, arguments.overrides)


def _take_folder(resumed: Path | None, hydra_part: DictConfig, overrides: list[str]) -> Callable[[], None]:
    """Holds the run's folder before Hydra writes there. Returns what to call if the run fails."""
    stated = run_folder.stated(overrides)
    used = resumed or (run_folder.of_this_second(hydra_part) if stated is None else None)
    if used is not None:
        _add([f"hydra.run.dir={compose.quoted(used)}"], overrides)
    if (held := used or stated) is not None and held.is_dir():
        run_folder.hold(held)
    return (lambda: None) if resumed is None else run_folder.remember(resumed)


def _add(overrides: Sequence[str], given: Sequence[str]) -> None:
    """Behind the last override that was given: there must be no option between them."""
    place = sys.argv.index(given[-1]) + 1 if given else len(sys.argv)
    sys.argv[place:place] = overrides


def _job(composed: DictConfig) -> float | None:
    """One job of a sweep. Launchers send this function to other processes, so that it holds nothing."""
    hydra_config = HydraConfig.get()
    return sweep.run_job(composed, Path(hydra_config.runtime.output_dir), hydra_config)


def _task(composed: DictConfig, stop: StopRequest, put_back: Callable[[], None]) -> NoReturn:
    """The run itself."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    run_folder.hold(folder)
    try:
        stop.wait_no_more()
        code = _run(composed, folder, list(hydra_config.overrides.task), stop)
        if code not in (0, INTERRUPTED):
            put_back()
    except Interrupted as interruption:  # before `run` took over
        stop.settle()
        _tell_interrupted(str(interruption))
        code = INTERRUPTED
    except BaseException as error:
        if isinstance(error, UserError | OSError):
            with contextlib.suppress(OSError):  # of a full disk
                run_folder.write_status(folder, "failed", reason=in_words(error, folder))
        put_back()
        if isinstance(error, OSError):
            raise UserError(in_words(error, folder)) from error
        raise
    _leave(code)


def _run(composed: DictConfig, folder: Path, overrides: list[str], stop: StopRequest) -> int:
    composed = micro_batch.resolve(composed, overrides, folder, report=say)
    config = compose.validate(composed, overrides, typed=())  # refused before if it had to be
    write_atomically(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(composed, resolve=True))
    if config.train.resume is not None:
        stop.moment = "before another step was done"  # after how many is known once checkpoints can be read
    with collector.still():
        from llmmed.run import run  # torch comes with it, and is not needed to refuse a mistake

    return run(config, folder, started=_STARTED, stop=stop)


def _tell_interrupted(reason: str) -> None:
    """Of a run that did not come to the point where it tells that itself."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if run_folder.read_status(folder).state != "finished":
        run_folder.write_status(folder, "interrupted", reason=reason)
    print(f"interrupted: {reason}; go on with {run_folder.resuming(folder)}", file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """Ends the process without the exit handlers of libraries: W&B's waits for a server or a service that is gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
