"""The step's clock on a CPU: real plans of a tiny model, and the line through two depths."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmmed.autotune.confirm import Failed
from llmmed.autotune.intervals import difference_interval
from llmmed.autotune.step_clock import _ROUNDS, StepClock, _sum_of
from llmmed.config import Config
from llmmed.kernels.base import Kernels
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer

LEAST, _ = _ROUNDS["cpu"]


@pytest.fixture
def clock(tiny: Config) -> StepClock:
    return StepClock(replace(tiny, model=replace(tiny.model, n_layers=6)), "eager")


def test_the_whole_model_lies_on_the_line_through_two_depths(clock: StepClock) -> None:
    assert clock.depths == (1, 2)
    # 3 ms of head, 2 ms a layer: six layers take 15.
    near, far = [5.0] * 9, [7.0] * 9
    assert clock._at_full_depth([near, far]) == pytest.approx((15.0, 15.0, 15.0))
    wobbly = [value + 0.1 * (-1) ** index for index, value in enumerate(far)]
    middle, low, high = clock._at_full_depth([near, wobbly])
    assert low < middle < high
    assert high - low == pytest.approx(5 * 0.2)


def test_the_line_is_about_a_whole_step(clock: StepClock, tiny: Config) -> None:
    tokens = 4 * tiny.train.global_batch_tokens
    twice = StepClock(replace(tiny, train=replace(tiny.train, global_batch_tokens=tokens)), "eager")
    assert twice.layers == 2
    assert twice._at_full_depth([[5.0] * 9, [7.0] * 9])[0] == pytest.approx(4 * 7.0)


def test_it_knows_how_often_a_step_calls_an_op(clock: StepClock) -> None:
    base = default_choice()
    norms = 2 * clock.layers + 1  # but for the first, each comes with an addition
    for plan, times in ((base, 1.0), ({**base, "add_rms_norm": "triton"}, 1 / norms), (base, 1.0)):
        assert clock.times_called(plan, "rms_norm") == pytest.approx(times)
        assert clock.times_called(plan, "newton_schulz") == 1.0  # once a step, however many micro-batches


def test_with_more_micro_batches_a_step_calls_more_often(tiny: Config) -> None:
    tokens = 4 * tiny.train.global_batch_tokens
    clock = StepClock(replace(tiny, train=replace(tiny.train, global_batch_tokens=tokens)), "eager")
    assert clock.times_called(default_choice(), "swiglu") == 4.0


def test_a_plan_against_itself_gains_nothing(clock: StepClock, monkeypatch: pytest.MonkeyPatch) -> None:
    base, chance, time_it = default_choice(), random.Random(0), clock._sample
    clock.set_default(base)

    def sample(run: Callable[[], object], number: int) -> float:
        assert time_it(run, number) > 0
        return 20.0 + chance.uniform(0.0, 0.1)  # whatever else this machine is doing

    monkeypatch.setattr(clock, "_sample", sample)
    match = clock.whole(base, base)
    assert match.first.ms == pytest.approx(20.0, abs=0.5)
    assert match.first.peak_memory_gib is None
    assert abs(match.gain_ms) < 0.5
    assert match.gain_ms_low < 0 < match.gain_ms_high
    duel = clock.duel(base, "swiglu", "pytorch")
    assert duel.memory_gain_mib is None
    assert abs(duel.gain_ms) < 0.5


def test_the_truth_is_the_gradient_of_a_model_of_that_depth(clock: StepClock, tiny: Config) -> None:
    """On the same weights and the batch that is not captured."""
    base = default_choice()
    clock.set_default(base)
    weights = clock._weights
    config = replace(tiny, model=replace(tiny.model, n_layers=2))
    model = Transformer.for_training(config, load_kernels(base), "cpu")
    model.load_state_dict(weights.state_dict())
    batch = clock._batches[1]
    model(batch[:, :-1], batch[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(clock._truth[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_what_is_the_compilers_calls_what_pytorchs_calls(clock: StepClock) -> None:
    base = default_choice()
    assert clock.called({**base, "add_rms_norm": "compiled"}) == clock.called(base)
    assert "rms_norm" in clock.called(base)


def test_another_result_in_the_step_is_a_failure(clock: StepClock, monkeypatch: pytest.MonkeyPatch) -> None:
    base = default_choice()
    clock.set_default(base)
    right = load_kernels(base)

    def wrong(choice: Any, launches: Any) -> Kernels:
        functions = dict(right.functions)
        functions["swiglu_mlp"] = lambda x, *weights: 1.1 * right.functions["swiglu_mlp"](x, *weights)
        return Kernels(functions, dict(choice))

    monkeypatch.setattr("llmmed.autotune.step_clock.load_kernels", wrong)
    with pytest.raises(Failed, match=r"in the step the gradient of .* differs by .* from PyTorch's"):
        clock.duel(base, "swiglu_mlp", "compiled")


def test_a_plan_that_raises_while_it_is_timed_as_a_whole_has_failed(
    clock: StepClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(first: object, second: object, **how: object) -> None:
        raise MemoryError

    monkeypatch.setattr(clock, "_subject", lambda *key: SimpleNamespace(run=None, memory_mib=None))
    monkeypatch.setattr(clock, "_pairs", out)
    with pytest.raises(Failed, match="out of memory"):
        clock.whole(default_choice(), default_choice())


def test_a_whole_step_takes_no_less_than_a_shallow_one(clock: StepClock) -> None:
    """Even if another process slowed the shallowest model down, so that the line through both depths falls."""
    busy, idle = [9.0, 9.1, 9.2], [3.0, 3.1, 3.2]
    times = clock._times(default_choice(), [busy, idle], [None, None], 0.0)
    assert (times.ms, times.ms_low, times.ms_high) == pytest.approx((3.1, 3.0, 3.2))


def test_a_whole_model_that_is_timed_has_an_interval(clock: StepClock) -> None:
    times = clock._times(default_choice(), [[3.0, 3.1, 3.2]], [None], 1.0)
    assert (times.ms, times.ms_low, times.ms_high) == pytest.approx((4.1, 4.0, 4.2))


@pytest.mark.parametrize("difference", [0.009, math.nan])
def test_a_default_that_differs_from_itself_is_no_measure(
    difference: float, clock: StepClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = ["highest"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: products[0])
    monkeypatch.setattr(clock, "_subject", lambda *key: None)
    monkeypatch.setattr(clock, "_differences", lambda subject: {"norm": 1e-4, "head": difference})
    with pytest.raises(
        Failed, match=r"eager, the default's gradient of head differs by .* from eager's, allowed 8.0e-03"
    ):
        clock.set_default(default_choice())
    monkeypatch.setattr(clock, "_differences", lambda subject: {"norm": 1e-4, "head": 0.007, "tail": 0.001})
    clock.set_default(default_choice())
    assert clock._allowed == pytest.approx({"norm": 2e-3, "head": 16e-3, "tail": 4e-3})
    products[0] = "high"  # TF32
    clock.set_default(default_choice())
    assert clock._allowed == pytest.approx({"norm": 2e-3, "head": 28e-3, "tail": 4e-3})


def test_the_update_of_the_optimizer_is_the_same_under_plans_that_share_its_ops(
    clock: StepClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = {"alone": 20.0, "pytorch": 25.0, "triton": 23.0}
    timed: list[tuple[str, str, str]] = []

    def pairs(a: str, b: str, enough: str = "difference") -> list[tuple[float, float]]:
        timed.append((a, b, enough))
        return [(took[a], took[b] + noise) for noise in (-0.1, 0.0, 0.1)]

    monkeypatch.setattr(clock, "called", lambda choice: {*clock._in_model, "newton_schulz"})
    monkeypatch.setattr(clock, "_subject", lambda choice, depth: None)
    monkeypatch.setattr(clock, "_steps", lambda _, choices: ["alone", *(each["newton_schulz"] for each in choices)])
    monkeypatch.setattr(clock, "_pairs", pairs)
    base = default_choice()
    assert clock._updates(base, {**base, "swiglu": "triton"}) == ((5.0, 5.0), (0.0, 0.0, 0.0))
    (first, second), gains = clock._updates(base, {**base, "newton_schulz": "triton"})
    assert (first, second) == (5.0, 3.0)
    assert gains == pytest.approx((2.0, 1.9, 2.1))
    assert clock._updates(base, {**base, "rotary": "triton"}) == ((5.0, 5.0), (0.0, 0.0, 0.0))
    # What an update takes is asked once, and not as closely as what is to be decided.
    assert timed == [("pytorch", "alone", "sign"), ("pytorch", "triton", "difference")]
    assert _sum_of((1.0, 0.7, 1.4), gains) == pytest.approx(
        (3.0, 3.0 - math.hypot(0.3, 0.1), 3.0 + math.hypot(0.4, 0.1))
    )


def test_an_update_is_timed_behind_the_micro_batches_of_its_step(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host issues it while the device is at them: by itself it would be charged for its launches."""
    done: list[str] = []
    train = replace(tiny.train, global_batch_tokens=3 * tiny.train.global_batch_tokens)
    clock = StepClock(replace(tiny, train=train), "eager")
    monkeypatch.setattr(clock, "_load", lambda choice: choice["newton_schulz"])
    monkeypatch.setattr(
        "llmmed.autotune.step_clock.optimizer_update", lambda config, kernels, mode: lambda: done.append(kernels)
    )
    subject = SimpleNamespace(run=lambda: done.append("micro-batch"))
    base = default_choice()
    alone, first, second = clock._steps(subject, [base, {**base, "newton_schulz": "triton"}])  # type: ignore[arg-type]
    assert set(done) == {"pytorch", "triton"}  # warm
    for step, last in ((alone, []), (first, ["pytorch"]), (second, ["triton"])):
        done.clear()
        step()
        assert done == [*3 * ["micro-batch"], *last]


def test_rounds_end_once_the_difference_is_known(clock: StepClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(noise: float) -> int:
        chance = random.Random(0)
        monkeypatch.setattr(clock, "_sample", lambda run, number: 20.0 + chance.uniform(0.0, noise))
        return len(clock._pairs(lambda: None, lambda: None))

    assert rounds(0.0) == LEAST
    assert LEAST < rounds(0.2) < rounds(4.0)


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_a_drift_of_the_clock_rate_is_not_taken_for_a_gain_or_a_loss(
    gain: float, clock: StepClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    drift, took = itertools.count(20.0, 0.5), {"slow": gain, "fast": 0.0}
    monkeypatch.setattr(clock, "_sample", lambda run, number: next(drift) + took[run()])
    pairs = clock._pairs(lambda: "slow", lambda: "fast")
    assert difference_interval([a - b for a, b in pairs])[0] == pytest.approx(gain)


def test_a_plan_beside_itself_takes_the_least_rounds(clock: StepClock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plan:
        def run(self) -> None:
            pass

    chance, plan = random.Random(0), Plan()
    monkeypatch.setattr(clock, "_sample", lambda run, number: 20.0 + chance.uniform(0.0, 4.0))
    assert len(clock._pairs(plan.run, plan.run)) == LEAST
    assert len(clock._pairs(plan.run, Plan().run)) > LEAST


def test_rounds_end_once_the_sign_is_clear_where_that_is_enough(
    clock: StepClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounds(gain: float, **how: Any) -> int:
        chance, took = random.Random(0), {"slow": 20.0 + gain, "fast": 20.0}
        monkeypatch.setattr(clock, "_sample", lambda run, number: took[run()] + chance.uniform(0.0, 4.0))
        return len(clock._pairs(lambda: "slow", lambda: "fast", **how))

    most = rounds(0.0)
    for enough in ("sign", "loss"):
        assert rounds(0.0, enough=enough) == most
    assert rounds(10.0, enough="sign") == rounds(-10.0, enough="sign") == LEAST
    assert rounds(-10.0, enough="loss") == LEAST
    assert rounds(10.0, enough="loss") == rounds(10.0) > LEAST  # by how much it gains is what is asked for
    assert most > LEAST


@pytest.mark.parametrize(("step_ms", "rounds"), [(8.0, 60), (60.0, 41), (180.0, 40), (400.0, 18), (600.0, 15)])
def test_slow_steps_of_a_gpu_have_rounds_as_far_as_seconds_allow(
    clock: StepClock, monkeypatch: pytest.MonkeyPatch, step_ms: float, rounds: int
) -> None:
    chance = random.Random(0)
    clock.device = torch.device("cuda")
    monkeypatch.setattr(clock, "_sample", lambda run, number: step_ms * chance.uniform(0.98, 1.0))
    assert len(clock._pairs(lambda: None, lambda: None)) == pytest.approx(rounds, abs=1)


def test_a_clear_loss_on_a_gpu_takes_few_rounds(clock: StepClock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.device = torch.device("cuda")

    def rounds(gain: float, **how: Any) -> int:
        chance, took = random.Random(0), {"slow": 60.0 + gain, "fast": 60.0}
        monkeypatch.setattr(clock, "_sample", lambda run, number: took[run()] + chance.uniform(0.0, 1.0))
        return len(clock._pairs(lambda: "slow", lambda: "fast", **how))

    least, _ = _ROUNDS["cuda"]
    assert rounds(-3.0, enough="loss") == 7
    assert rounds(-3.0, enough="sign") == least
    assert rounds(3.0, enough="loss") >= least
    assert rounds(-0.1, enough="loss") > least


def test_memory_is_measured_where_times_are_taken(clock: StepClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is only checked, as those of two layers are once the whole model is tried, needs no pass for it."""
    measured: list[int] = []

    def build(model: Transformer, *rest: Any, takes_memory: bool) -> None:
        if takes_memory:
            measured.append(len(model.layers))

    monkeypatch.setattr("llmmed.autotune.step_clock.Subject", build)
    for depth in (1, 2):
        clock._build(default_choice(), depth, "eager")
    clock.trial_depth, clock.depths = 6, (6, 6)
    clock._weights = Transformer.for_training(replace(clock._config), load_kernels(default_choice()), "cpu")
    for depth in (2, 6):
        clock._build(default_choice(), depth, "eager")
    assert measured == [1, 2, 6]
