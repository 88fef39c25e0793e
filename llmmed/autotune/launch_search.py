"""The search for launch parameters: the kernels of a verified implementation, each launched in a few ways.

One kernel at a time is launched otherwise than by default, all variants in turns on the same inputs, at the run's own
calls. What is faster by more than the noise must then pass the gate at these calls: another launch can be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmmed.autotune.failures import classify
from llmmed.autotune.intervals import median_interval
from llmmed.autotune.measure import Pass
from llmmed.autotune.plan import KernelLaunch, LaunchTrial, Status
from llmmed.autotune.verify import verify
from llmmed.kernels.ahead_of_time import launching_nothing, run_on_meta
from llmmed.kernels.base import Call, Implementation, Op, Outputs
from llmmed.kernels.tunable import Launches, Site, Values, seen_launches

Function = Callable[..., Outputs]
Times = Callable[[Call, Mapping[str, Function], Callable[[str, Exception], None]], Mapping[str, Sequence[Pass]]]
Gate = Callable[[Sequence[Call], Launches, Site], str]  # as `gate_at`, of one implementation

_LEAST_GAIN = 0.02  # of the kernel's pass, and more than the noise: else the default stays
_DEFAULT = "default"


@dataclass(frozen=True)
class OpenSite:
    """A kernel whose launch is to be searched: the default, what else to try, in which pass, at which calls."""

    site: Site
    default: Values
    alternatives: list[Values]
    backward: bool
    calls: list[Call] = field(default_factory=list)


def open_sites(
    op: Op, implementation: Implementation, function: Function, calls: Sequence[Call], device: torch.device
) -> list[OpenSite]:
    """What there is to search, found by making the calls on meta tensors. Launches nothing."""
    found: dict[Site, OpenSite] = {}
    for call in calls:
        for site, backward in _sites(op, function, call, device).items():
            for tunable in implementation.tunable if site not in found else ():
                if tunable.kernel == site.kernel and (options := tunable.alternatives(device, site)):
                    found[site] = OpenSite(site, tunable.default(device, site), options, backward)
            if site in found:
                found[site].calls.append(call)
    return list(found.values())


def search_launches(
    op: Op,
    implementation: Implementation,
    function: Function,
    calls: Mapping[Call, int],
    *,
    device: torch.device,
    times: Times,
    gate: Gate,
    time_is_up: Callable[[], bool] = lambda: False,
) -> list[KernelLaunch]:
    """Finds how to launch each kernel. What the process does after it is up to `implementation.take_launches`.

    Args:
        op: The op.
        implementation: Verified, with `tunable` kernels.
        function: What `catalog.load_function` gave.
        calls: The run's, and how often a micro-batch makes each.
        device: Where.
        times: Times functions in turns at a call, and tells of each that raises.
        gate: `gate_at` for this implementation.
        time_is_up: Asked before each kernel is timed, where those that are left keep their defaults, and before the
            gate sees more than the fastest variant of one.
    """
    most_frequent_first = sorted(calls, key=lambda call: -calls[call])
    opened = open_sites(op, implementation, function, most_frequent_first, device)
    trials: list[dict[str, LaunchTrial]] = []
    for each in opened:  # all before the gate, which keeps what it holds results against in memory
        trials.append(_unsearched(each) if time_is_up() else _try(each, implementation, function, times))
    chosen: dict[Site, Values] = {}
    for each, tried in zip(opened, trials, strict=True):
        chosen[each.site] = _best(tried, each, chosen, gate, time_is_up)
    implementation.take_launches({})
    return [
        KernelLaunch(
            kernel=each.site.kernel, at=dict(each.site.at), chosen=dict(chosen[each.site]), tried=list(tried.values())
        )
        for each, tried in zip(opened, trials, strict=True)
    ]


def check_launches(
    op: Op,
    implementation: Implementation,
    function: Function,
    calls: Mapping[Call, int],
    given: Sequence[KernelLaunch],
    *,
    device: torch.device,
    gate: Gate,
) -> list[KernelLaunch]:
    """Launches of somebody's plan as far as this run's calls have them; the default for what does not pass the gate,
    and for what nobody would try here: a kernel for another GPU may end the process that compiles it."""
    chosen: dict[Site, Values] = {}
    found = []
    opened = {each.site: each for each in open_sites(op, implementation, function, list(calls), device)}
    for launch in (each for each in given if each.site in opened):
        at = opened[launch.site]
        if launch.chosen.keys() == at.default.keys() and launch.chosen not in (at.default, *at.alternatives):
            reason = "not among what this version launches on this GPU"
        else:
            reason = gate(at.calls, {**chosen, launch.site: launch.chosen}, launch.site)
        if reason:
            refused = [LaunchTrial(values=dict(at.default)), LaunchTrial(values=launch.chosen, reason=reason)]
            launch = launch.model_copy(update={"chosen": dict(at.default), "tried": refused})
        chosen[launch.site] = launch.chosen
        found.append(launch)
    return found


def gate_at(
    op: Op,
    implementation: Implementation,
    function: Function,
    calls: Sequence[Call],
    launches: Launches,
    site: Site,
    *,
    device: torch.device,
    deterministic: bool,
) -> str:
    """Holds an implementation to the gate at the run's calls, launched so. Returns why it does not pass, or nothing.

    `site` is the one of the launches that is to be proved.
    """
    try:
        implementation.take_launches(launches)
        with seen_launches() as seen:
            verdict = verify(op, implementation, function, calls, device, deterministic=deterministic, cases=())
    except ValueError as error:
        return str(error)
    finally:
        implementation.take_launches({})
    if verdict.status != "verified":
        return f"{verdict.status.replace('_', ' ')}: {verdict.reason}"
    # The gate takes smaller calls where a call is very large. What it did not launch is not proved.
    return "" if seen.get(site) == launches[site] else "the gate did not come to launch it so"


def _sites(op: Op, function: Function, call: Call, device: torch.device) -> dict[Site, bool]:
    """What a call launches that can be tuned, and whether its backward pass does."""
    forward: list[set[Site]] = []
    with launching_nothing(device), seen_launches() as seen:

        def arriving(output: Tensor) -> Tensor:
            forward.append(set(seen))
            return torch.empty_like(output)

        run_on_meta(op, function, call, arriving)
    return {site: bool(forward) and site not in forward[0] for site in seen}


def _launched(implementation: Implementation, function: Function, launches: Launches) -> Function:
    """The function, with the kernels of what it computes launched so in the backward pass that follows as well."""

    def run(**inputs: object) -> Outputs:
        implementation.take_launches(launches)
        return function(**inputs)

    return run


def _try(opened: OpenSite, implementation: Implementation, function: Function, times: Times) -> dict[str, LaunchTrial]:
    """Every way to launch one kernel, by name: times, or why there are none."""
    variants = {_DEFAULT: opened.default, **{str(i): values for i, values in enumerate(opened.alternatives)}}
    functions = {name: _launched(implementation, function, {opened.site: v}) for name, v in variants.items()}
    failures: dict[str, tuple[Status, str]] = {}

    def failed(name: str, error: Exception) -> None:
        failures[name] = classify(error)  # at once: an exception keeps what the frames that it came through held

    passes = times(opened.calls[0], functions, failed)
    trials = {}
    for name, values in variants.items():
        if name in failures:
            status, reason = failures[name]
            trials[name] = LaunchTrial(values=dict(values), reason=f"{status.replace('_', ' ')}: {reason}")
        else:
            samples = [p.backward if opened.backward else p.forward for p in passes[name]]
            middle, low, high = median_interval(samples)
            trials[name] = LaunchTrial(values=dict(values), ms=middle, ms_low=low, ms_high=high)
    return trials


def _unsearched(opened: OpenSite) -> dict[str, LaunchTrial]:
    return {_DEFAULT: LaunchTrial(values=dict(opened.default), reason="no time was left to search")}


def _best(
    trials: dict[str, LaunchTrial], opened: OpenSite, chosen: Launches, gate: Gate, time_is_up: Callable[[], bool]
) -> Values:
    """The fastest that beats the default and passes the gate. Writes into `trials` why others do not."""
    beating = [name for name, trial in trials.items() if _beats(trial, trials[_DEFAULT])]
    better = sorted(beating, key=lambda name: trials[name].ms or 0.0)
    for name in better:
        values = trials[name].values
        if name != better[0] and time_is_up():
            reason = "no time was left to prove it"
        else:
            reason = gate(opened.calls, {**chosen, opened.site: values}, opened.site)
        if not reason:
            return values
        trials[name] = trials[name].model_copy(update={"reason": reason})
    return opened.default


def _beats(trial: LaunchTrial, default: LaunchTrial) -> bool:
    if trial.ms is None or trial.ms_high is None or default.ms is None or default.ms_low is None:
        return False  # it raised
    return trial.ms * (1 + _LEAST_GAIN) < default.ms and trial.ms_high < default.ms_low
