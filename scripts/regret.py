"""Shows what the tuner's greed costs: its plan against all plans near it, and near PyTorch's.

    python scripts/regret.py model=small                     one flip from the plan; one and two from PyTorch's
    python scripts/regret.py model=large pairs=false seconds=300 out=large.json
    python scripts/regret.py show=small.json,large.json      what was found before, as tables in Markdown

Takes the overrides of `scripts/train.py`. The plan comes from the tuning cache if it is there, or from a finished run's
`kernels.json`, with `plan=<path>`: its verdicts are then taken as they are. `out=<path>` is written after every plan
that was tried; if it is there already, of the same plan, kernels and hardware, what it lacks is tried. The exit code is
1 if a neighbour is faster than the chosen plan by more than 1 %, beyond the noise.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from llmmed import consoles
from llmmed.autotune.compiled_ahead import compile_ahead
from llmmed.autotune.confirm import Choice, Failed
from llmmed.autotune.hardware import describe_hardware
from llmmed.autotune.plan import KernelPlan, Mode
from llmmed.autotune.process_settings import take_one_core
from llmmed.autotune.regret import Neighbour, Regret, choice_of, measure_regret, measured_before, neighbours
from llmmed.autotune.step_ahead import little_memory, most_processes
from llmmed.autotune.step_clock import StepClock
from llmmed.autotune.tuner import tune
from llmmed.autotune.workload import record_workload
from llmmed.compose import compose
from llmmed.config import Config
from llmmed.consoles import answered_help
from llmmed.errors import UserError
from llmmed.files import write_json
from llmmed.kernels.catalog import DEFAULT
from llmmed.machine import cores
from llmmed.reporting.regret_table import markdown
from llmmed.training import prepare_backend, resolve_compile

_LIMIT = 0.01
_COMPILING_SECONDS = 120.0  # of one plan
_NICER = 4  # than the process that times
_OWN = {"pairs": "true", "seconds": "600", "plan": "", "out": "", "show": ""}


def main(arguments: list[str]) -> int:
    console = consoles.output()
    own = _OWN | {key: value for key, _, value in (a.partition("=") for a in arguments) if key in _OWN}
    try:
        if own["show"]:
            print(markdown([Path(path) for path in own["show"].split(",")]))
            return 0
        config = compose([a for a in arguments if a.partition("=")[0] not in _OWN])
        if own["pairs"] not in ("true", "false"):
            raise UserError(f"pairs={own['pairs']}: true or false")
        try:
            seconds = float(own["seconds"])
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < math.inf:
            raise UserError(f"seconds={own['seconds']}: a number above 0")
        given = KernelPlan.read_stated("plan", own["plan"]) if own["plan"] else None
        workload = record_workload(config)
        calls = workload.by_op()
        if given is not None and (given.workload_fingerprint, set(given.ops)) != (workload.fingerprint(), set(calls)):
            raise UserError(f"plan={own['plan']}: the plan of a step that makes other calls than this one")
        if given is not None and given.mode != resolve_compile(config):
            raise UserError(f"plan={own['plan']}: it is for train.compile={given.mode}, not {resolve_compile(config)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out = Path(own["out"]) if own["out"] else None
    prepare_backend(config)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    started = time.perf_counter()
    if given is not None and given.hardware != describe_hardware(config.device):
        console.print(f"plan={own['plan']} is from {given.hardware.device}, or from other versions")
    plan = given or tune(config, workload, mode=resolve_compile(config), report=lambda p: None)

    about = {
        "chosen": plan.choice,
        "hardware": describe_hardware(config.device).model_dump(),
        "model": config.model.name,
        "sources": {op: found.source_sha256 for op, found in plan.ops.items()},
    }
    try:
        before = measured_before(out, about) if out is not None else []
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    def told(regret: Regret) -> None:
        neighbour = regret.neighbours[-1]
        result = neighbour.reason or f"{neighbour.gain_ms:+.3f} ms"
        console.print(f"[dim]{time.perf_counter() - started:5.0f} s  {neighbour.name}: {result}[/]")
        if out is not None:
            write_json(out, regret.to_json() | about)

    near = neighbours(plan, pairs=own["pairs"] == "true")
    clock = StepClock(config, plan.mode, plan.launches)
    known = {each.name for each in before}
    with _compiling(config, clock, plan, [each for each in near if each.name not in known]) as ready:
        try:
            regret = measure_regret(
                clock,
                plan,
                near,
                told=told,
                time_is_up=lambda: time.perf_counter() - started > seconds,
                ready=ready,
                before=before,
            )
        except Failed as failure:
            print(f"error: {failure}", file=sys.stderr)
            return 1
    if out is not None:
        write_json(out, regret.to_json() | about)
    _print(regret, config.model.name, console)
    return int(regret.share > _LIMIT)


@contextlib.contextmanager
def _compiling(
    config: Config, clock: StepClock, plan: KernelPlan, near: list[Neighbour]
) -> Iterator[Callable[[Choice], None]]:
    """Compiles all plans, several at a time, in the order in which they are timed: in the process that times them it
    would take half of the time. Gives what waits for a plan, at once where the step could wait for the host."""
    if config.device != "cuda" or plan.mode == "eager":
        yield lambda choice: None
        return
    wanted: list[Choice] = [dict.fromkeys(plan.ops, DEFAULT), plan.choice]
    wanted += [c for each in near if each.flips.keys() <= clock.called(c := choice_of(each, plan))]
    processes = max(1, min(most_processes(clock.device), cores() // 2, len(wanted)))
    with multiprocessing.get_context("spawn").Pool(processes, _begin_compiling) as pool:
        under_way = [(each, pool.apply_async(_compile, (config, each, plan.mode))) for each in wanted]

        def wait(choice: Choice) -> None:
            # Not for ever: the job of a process that was killed is lost, and the plan is compiled where it is timed.
            for each, job in under_way:
                if each == choice:
                    job.wait(_COMPILING_SECONDS)

        if plan.mode != "graphs":
            for each in wanted:
                wait(each)
        yield wait


def _begin_compiling() -> None:
    os.nice(_NICER)
    take_one_core()
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024


def _compile(config: Config, choice: Choice, mode: Mode) -> None:
    with contextlib.suppress(Exception), little_memory(torch.device(config.device)):
        prepare_backend(config)  # what does not compile is told where it is timed
        compile_ahead(config, choice, mode)


def _print(regret: Regret, model: str, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("plan")
    table.add_column("saves against\nthe chosen, ms", justify="right")
    table.add_column("95 % interval", justify="right")
    for each in sorted(regret.neighbours, key=lambda n: -(n.gain_ms if n.gain_ms is not None else -1e9)):
        if each.gain_ms is None:
            table.add_row(each.name, "-", each.reason)
        else:
            table.add_row(each.name, f"{each.gain_ms:+.3f}", f"{each.gain_ms_low:+.3f} to {each.gain_ms_high:+.3f}")
    console.print(table)
    told = f", {regret.left_out} not tried for lack of time" if regret.left_out else ""
    console.print(
        f"{model}: the chosen plan takes {regret.chosen_ms:.3f} ms; regret {max(0.0, regret.share):.2%} of "
        f"{len(regret.neighbours)} neighbours{told}"
    )


if __name__ == "__main__":
    sys.exit(0 if answered_help(__doc__) else main(sys.argv[1:]))
