"""The command behind `scripts/benchmark.py`. A mistake is one line and exit code 1."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
import omegaconf
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from llmmed import compose, run_folder
from llmmed.benchmark.settings import (
    CONFIG_NAME,
    OpsSettings,
    Settings,
    as_lists,
    compose_benchmark,
    validate,
)
from llmmed.config import Config
from llmmed.errors import UserError
from llmmed.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from llmmed.autotune.plan import Ceilings
    from llmmed.benchmark.ops import Tell
    from llmmed.benchmark.results import OpRow, OpsResult, Origin, StepResult

_INTERRUPTED = 130

_command: list[str] = []  # as it was given


def main() -> None:
    """Composes, validates and runs what `sys.argv` asks for."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _command[:] = sys.argv
    sys.argv = [sys.argv[0], *as_lists(sys.argv[1:])]
    try:
        compose.register()
        if not _answered_early():
            folder = str(compose.config_folder())
            hydra.main(version_base="1.3", config_path=folder, config_name=CONFIG_NAME)(_task)()
    except UserError as error:
        _exit(str(error))
    except (HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        _exit(compose.explain(error, CONFIG_NAME))
    except OSError as error:
        _exit(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _answered_early() -> bool:
    """Refuses a mistake before Hydra makes a folder for it, and does what needs none."""
    arguments = get_args_parser().parse_args()
    if arguments.multirun:
        raise UserError("a benchmark goes through lists itself; leave -m out and write sizes=small,base")
    if any(getattr(arguments, name, None) for name in ("help", "hydra_help", "cfg", "info", "shell_completion")):
        return False
    settings, _ = compose_benchmark(arguments.overrides)
    if not settings.report:
        return False
    from llmmed.benchmark.page import write_page

    for path in write_page([Path(folder) for folder in settings.report], Path(settings.page)):
        print(path)
    return True


def _task(composed: DictConfig) -> None:
    from llmmed import consoles

    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    settings, config = validate(composed, overrides)
    folder = Path(hydra_config.runtime.output_dir)
    write_atomically(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(composed, resolve=True))
    try:
        console = consoles.output()
        run(settings, config, overrides, folder, console)
    except UserError as error:
        _exit(str(error))


def run(
    settings: Settings, config: Config, overrides: Sequence[str], folder: Path, console: Console
) -> OpsResult | StepResult:
    """Measures, prints the table, and writes plots, JSON and CSV into the folder; an interruption leaves the latter."""
    from llmmed.benchmark import results, tables
    from llmmed.reporting.benchmark_plots import draw

    folder.mkdir(parents=True, exist_ok=True)
    origin = results.origin(config.device, compose.as_dict(config), _command)
    console.print(tables.header(origin), highlight=False)
    with _bar(console) as tell:
        for found in _results(settings, overrides, folder, tell, origin):
            result = found
            results.write(result, folder)
    tables.show(result, console)
    pictures = draw(result, folder)
    written = [f"{result.kind}.json", f"{result.kind}.csv", *(path.name for path in pictures)]
    told = f"took {result.seconds:.0f} s; in {run_folder.shown(folder)}: {', '.join(written)}"
    console.print(f"\n{told}", markup=False, soft_wrap=True)
    return result


def _results(
    settings: Settings, overrides: Sequence[str], folder: Path, tell: Tell, origin: Origin
) -> Iterator[OpsResult | StepResult]:
    """The result so far, again and again."""
    from llmmed.benchmark import results
    from llmmed.benchmark.ops import run_ops
    from llmmed.benchmark.results import OpsResult, StepResult
    from llmmed.benchmark.step import run_step

    begun = time.perf_counter()
    if isinstance(settings, OpsSettings):

        def so_far(rows: list[OpRow], ceilings: dict[str, Ceilings]) -> OpsResult:
            return OpsResult(origin=origin, seconds=time.perf_counter() - begun, ceilings=ceilings, rows=rows)

        def keep(rows: list[OpRow], ceilings: dict[str, Ceilings]) -> None:
            results.write(so_far(rows, ceilings), folder)

        for op_rows, ceilings in run_ops(settings, overrides, tell, keep):
            yield so_far(op_rows, ceilings)
    else:
        for shapes, rows in run_step(settings, overrides, folder, tell):
            yield StepResult(origin=origin, seconds=time.perf_counter() - begun, shapes=shapes, rows=rows)


@contextmanager
def _bar(console: Console) -> Iterator[Tell]:
    """A progress bar on a terminal, a line for every tenth in a file."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(20),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=1.0)
        tenths = 0

        def tell(done: float, what: str) -> None:
            nonlocal tenths
            progress.update(bar, completed=done, description=what)
            if not console.is_terminal and int(10 * done) > tenths:
                tenths = int(10 * done)
                console.print(f"{done:4.0%}  {what}", markup=False)

        yield tell


def _exit(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
