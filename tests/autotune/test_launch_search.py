"""The search for launch parameters, with a planted kernel: what is faster and right is taken, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llmmed.autotune.launch_search import check_launches, gate_at, open_sites, search_launches
from llmmed.autotune.measure import Pass
from llmmed.autotune.plan import Candidate, KernelLaunch, KernelPlan
from llmmed.autotune.step_clock import StepClock
from llmmed.autotune.step_plan import at_depth
from llmmed.autotune.tuner import tune
from llmmed.autotune.workload import Workload, record_workload
from llmmed.config import Config
from llmmed.kernels import catalog
from llmmed.kernels.base import Call, Implementation, Outputs
from llmmed.kernels.catalog import get_op
from llmmed.kernels.tunable import Launches, Site, Tunable, Values, seen_launches
from llmmed.model import Transformer
from llmmed.run import build

CPU = torch.device("cpu")
OP = get_op("rms_norm")
DEFAULT, RIGHT, SLOWER, WRONG, RAISES = 1, 2, 3, 4, 5
MS = {DEFAULT: 1.0, RIGHT: 0.8, SLOWER: 2.0, WRONG: 0.1}
FORWARD, BACKWARD = Site("forward", (("width", 64),)), Site("backward", (("width", 64),))


class Launch(NamedTuple):
    block: int


class Planted:
    """`rms_norm` with a forward and a backward kernel, whose launches do what their names above say."""

    def __init__(self) -> None:
        self.forward, self.backward = (
            Tunable(name, lambda device, width: Launch(DEFAULT), lambda device, width: map(Launch, range(2, 6)))
            for name in ("forward", "backward")
        )
        self.implementation = Implementation("planted", load=lambda: self, tunable=(self.forward, self.backward))

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        y = y * _factor(self.forward(x.device, width=x.shape[-1]))
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * _factor(self.backward(x.device, width=x.shape[-1])))
        return y


def _factor(launch: Launch) -> float:
    if launch.block == RAISES:
        raise RuntimeError("out of resource: shared memory")
    return 1.02 if launch.block == WRONG else 1.0


@pytest.fixture
def planted() -> Planted:
    return Planted()


@pytest.fixture
def calls(norms: Workload) -> dict[Call, int]:
    return norms.by_op()["rms_norm"]


def gate(planted: Planted) -> Callable[[Sequence[Call], Launches, Site], str]:
    return partial(gate_at, OP, planted.implementation, planted, device=CPU, deterministic=False)


def times(
    call: Call, functions: Mapping[str, Callable[..., Outputs]], failed: Callable[[str, Exception], None]
) -> dict[str, list[Pass]]:
    """As long as `MS` says, by the launches that a forward and a backward pass make."""
    found = {}
    for name, function in functions.items():
        x, weight = (call.spec(n).empty("cpu").normal_().requires_grad_() for n in ("x", "weight"))
        try:
            with seen_launches() as seen:
                torch.autograd.grad(function(x=x, weight=weight, eps=1e-5).sum(), [x, weight])
        except RuntimeError as error:
            failed(name, error)
        else:
            forward, backward = (MS[seen[site]["block"]] for site in (FORWARD, BACKWARD))
            found[name] = [Pass(forward + 1e-3 * i, backward + 1e-3 * i) for i in range(9)]
    return found


def search(planted: Planted, calls: dict[Call, int], **options: Any) -> list[KernelLaunch]:
    given = {"times": times, "gate": gate(planted)} | options
    return search_launches(OP, planted.implementation, planted, calls, device=CPU, **given)


def test_sites_are_found_without_running_anything(planted: Planted, calls: dict[Call, int]) -> None:
    found = open_sites(OP, planted.implementation, planted, list(calls), CPU)
    assert [(each.site, each.backward) for each in found] == [(FORWARD, False), (BACKWARD, True)]
    assert found[0].default == {"block": DEFAULT}
    assert [values["block"] for values in found[0].alternatives] == [RIGHT, SLOWER, WRONG, RAISES]
    assert found[0].calls == list(calls)


def test_the_fastest_that_is_right_is_taken(planted: Planted, calls: dict[Call, int]) -> None:
    forward, backward = search(planted, calls)
    assert (forward.site, backward.site) == (FORWARD, BACKWARD)
    for found in (forward, backward):
        assert found.chosen == {"block": RIGHT}
        told = {trial.values["block"]: trial for trial in found.tried}
        assert list(told) == [DEFAULT, RIGHT, SLOWER, WRONG, RAISES]
        assert told[WRONG].ms == pytest.approx(0.1, abs=0.01)  # the fastest by far
        assert told[WRONG].reason.startswith("wrong: ")
        assert told[RAISES].ms is None
        assert told[RAISES].reason == "crashed: RuntimeError: out of resource: shared memory"
        assert told[RIGHT].reason == told[SLOWER].reason == ""
    assert planted.forward(CPU, width=64) == Launch(DEFAULT)  # a search leaves no trace


def test_what_is_within_noise_or_hardly_faster_is_not_taken(
    planted: Planted, calls: dict[Call, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(*arguments: Any) -> dict[str, list[Pass]]:
        passes = times(*arguments)
        return {
            n: [Pass(p.forward + (0.4 * (i % 2)), p.backward) for i, p in enumerate(found)]
            for n, found in passes.items()
        }

    monkeypatch.setitem(MS, WRONG, 3.0)
    assert [found.chosen["block"] for found in search(planted, calls, times=noisy)] == [DEFAULT, RIGHT]
    monkeypatch.setitem(MS, RIGHT, 0.985)
    assert [found.chosen["block"] for found in search(planted, calls)] == [DEFAULT, DEFAULT]


def test_what_the_gate_does_not_launch_is_not_proved(planted: Planted, calls: dict[Call, int]) -> None:
    other = Site("forward", (("width", 65),))
    assert gate(planted)(list(calls), {FORWARD: {"block": RIGHT}}, FORWARD) == ""
    assert "did not come to" in gate(planted)(list(calls), {other: {"block": RIGHT}}, other)


def test_without_time_the_default_stays_and_is_said_to(planted: Planted, calls: dict[Call, int]) -> None:
    answers = chain([False, True], repeat(False))
    forward, backward = search(planted, calls, time_is_up=lambda: next(answers))
    assert forward.chosen == {"block": RIGHT}
    assert backward.chosen == {"block": DEFAULT}
    assert [trial.reason for trial in backward.tried] == ["no time was left to search"]


def test_the_fastest_of_each_kernel_is_proved_whatever_the_time(
    planted: Planted, calls: dict[Call, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MS, WRONG, 3.0)
    answers = chain([False, False], repeat(True))
    forward, _ = search(planted, calls, time_is_up=lambda: next(answers))
    assert forward.chosen == {"block": RIGHT}


def test_what_there_is_no_time_to_prove_is_not_taken(planted: Planted, calls: dict[Call, int]) -> None:
    answers = chain([False, False], repeat(True))
    for found in search(planted, calls, time_is_up=lambda: next(answers)):
        assert found.chosen == {"block": DEFAULT}
        assert "no time was left to prove it" in [trial.reason for trial in found.tried]


def test_somebodys_launches_pass_the_gate_or_are_refused(planted: Planted, calls: dict[Call, int]) -> None:
    def given(block: int, kernel: str = "forward", **at: int) -> KernelLaunch:
        return KernelLaunch(kernel=kernel, at=at or {"width": 64}, chosen={"block": block})

    check = partial(check_launches, OP, planted.implementation, planted, calls, device=CPU, gate=gate(planted))
    assert check([given(SLOWER)]) == [given(SLOWER)]
    (wrong, raises) = check([given(WRONG), given(RAISES, "backward")])
    assert (wrong.chosen, raises.chosen) == ({"block": DEFAULT}, {"block": DEFAULT})
    assert wrong.tried[-1].reason.startswith("wrong: ")
    assert raises.tried[-1].reason.startswith("crashed: ")
    (foreign,) = check([KernelLaunch(kernel="forward", at={"width": 64}, chosen={"tile": 2})])
    assert foreign.chosen == {"block": DEFAULT}
    assert "has no launch by tile but by block" in foreign.tried[-1].reason
    assert check([given(RIGHT, width=65), given(RIGHT, "another")]) == []


def test_somebodys_launch_that_nobody_would_try_here_is_not_even_compiled(
    planted: Planted, calls: dict[Call, int]
) -> None:
    def compiled(*_: object) -> str:
        raise AssertionError("it went to the gate")

    foreign = KernelLaunch(kernel="forward", at={"width": 64}, chosen={"block": 4096})
    (refused,) = check_launches(OP, planted.implementation, planted, calls, [foreign], device=CPU, gate=compiled)
    assert refused.chosen == {"block": DEFAULT}
    assert refused.tried[-1].reason == "not among what this version launches on this GPU"


def test_launches_survive_json(planted: Planted, calls: dict[Call, int]) -> None:
    candidate = Candidate(status="verified", launches=search(planted, calls))
    again = Candidate.model_validate(json.loads(json.dumps(candidate.model_dump(mode="json"), sort_keys=True)))
    assert again == candidate
    planted.implementation.take_launches(again.launch_values)
    assert planted.forward(CPU, width=64) == planted.backward(CPU, width=64) == Launch(RIGHT)
    assert planted.forward(CPU, width=65) == Launch(DEFAULT)


def test_a_run_and_its_trials_launch_as_the_plan_says(
    planted: Planted, calls: dict[Call, int], tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a resumed run has is the plan out of its checkpoint, which is JSON."""
    found = search(planted, calls)
    plan = tune(replace(tiny, kernels=replace(tiny.kernels, policy="pytorch")), record_workload(tiny), mode="eager")
    candidate = Candidate(status="verified", launches=found)
    op = plan.ops["rms_norm"].model_copy(update={"chosen": "planted", "candidates": {"planted": candidate}})
    plan = KernelPlan.from_json(
        json.loads(json.dumps(plan.model_copy(update={"ops": plan.ops | {"rms_norm": op}}).to_json()))
    )
    get = catalog.get_implementation
    monkeypatch.setattr(
        catalog, "get_implementation", lambda op, name: planted.implementation if name == "planted" else get(op, name)
    )

    def launched(model: Transformer) -> dict[Site, Values]:
        tokens = torch.zeros((2, 16), dtype=torch.int64)
        with seen_launches() as seen:
            model(tokens, tokens).backward()
        return dict(seen)

    expected = {FORWARD: {"block": RIGHT}, BACKWARD: {"block": RIGHT}}
    assert launched(build(tiny, plan)) == expected
    planted.implementation.take_launches({})
    clock = StepClock(tiny, "eager", plan.launches)
    assert launched(at_depth(tiny, clock._weights, clock._load({"rms_norm": "planted"}), 1)) == expected
