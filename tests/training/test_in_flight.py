"""Metrics are read when the device is done with them: the host goes on, nothing is lost, and all comes in order."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import pytest
import torch
from safetensors.torch import load_file

from llmmed.data import Batches
from llmmed.errors import UserError
from llmmed.files import read_metrics
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer
from llmmed.signals import Interrupted
from llmmed.training import checkpoint, in_flight
from llmmed.training.execution import take_deterministic_kernels
from llmmed.training.in_flight import EventMark, HostMark, InFlight
from llmmed.training.profiling import StepTrace
from llmmed.training.progress import TrainingProgress
from tests.training.tiny import build, newest_checkpoint, pattern, run, run_with, tiny_config

CPU = torch.device("cpu")


class Late(HostMark):
    """As of a device that has done nothing until it is waited for: then all that was issued before, and that alone."""

    made, done = 0, 0

    def __init__(self) -> None:
        super().__init__()
        Late.made += 1
        self._number = Late.made

    def passed(self) -> bool:
        return Late.done >= self._number

    def wait(self) -> None:
        Late.done = max(Late.done, self._number)

    def seconds_since(self, earlier: Self) -> float:
        assert self.passed()
        assert earlier.passed()
        return super().seconds_since(earlier)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "mark", lambda device: Late())


class Watch:
    """A sink that notes how many steps had been issued when a step was logged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.issued, self.at = 0, dict[int, int]()
        monkeypatch.setattr(TrainingProgress, "advance", lambda _, step: setattr(self, "issued", step))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "loss" in metrics:
            self.at[step] = self.issued

    def finish(self, summary: Mapping[str, object], status: str) -> None:
        pass


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def before_step(model: Transformer, watch: Watch, step: int, act: Callable[[], None]) -> None:
    """Has something happen in the forward pass of a step."""
    model.register_forward_pre_hook(lambda *_: act() if watch.issued == step - 1 else None)


def learnt(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    entries = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries]


def test_readings_come_in_order_once_they_are_there(late: None) -> None:
    steps = InFlight(CPU)
    for step in range(1, 6):
        values = {"count": torch.tensor(step), "half": torch.tensor(0.5)}
        steps.add(step, values if step % 2 == 0 else None, memory_gib=float(step))
        assert not list(steps.finished(left=5))
    (found,) = steps.finished(left=2)
    assert (found.step, found.values, found.memory_gib) == (2, {"count": 2.0, "half": 0.5}, 2.0)
    assert not list(steps.finished(left=2))
    Late.done = Late.made
    assert [found.step for found in steps.finished(left=2)] == [4]
    assert not list(steps.finished(left=0))


def test_values_are_read_after_their_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    arriving = torch.zeros(1)

    class Arrival(HostMark):
        def passed(self) -> bool:
            return False

        def wait(self) -> None:
            arriving.fill_(3.0)

    monkeypatch.setattr(in_flight, "mark", lambda device: Arrival())
    monkeypatch.setattr(torch, "stack", lambda _: arriving)  # what is copied behind the step
    steps = InFlight(CPU)
    steps.add(1, {"value": torch.zeros(())})
    assert [found.values for found in steps.finished(left=0)] == [{"value": 3.0}]


def test_the_speed_is_that_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(in_flight.time, "perf_counter", lambda: clock)
    steps, values, speeds = InFlight(CPU), {"value": torch.zeros(())}, []
    steps.restart(1)
    for step in range(1, 9):
        clock += 0.5
        steps.add(step, values if step in (1, 4, 8) else None)
        clock += 9.0  # until somebody looks
        speeds += [found.steps_per_second for found in steps.finished(left=3)]
        if step == 4:
            steps.restart(4)
    assert speeds == [None, 3 / (3 * 9.5), 4 / (4 * 9.5 - 9.0)]


def test_a_reading_that_is_not_timed_leaves_the_time_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(in_flight.time, "perf_counter", lambda: clock)
    steps, value, speeds = InFlight(CPU), {"value": torch.zeros(())}, []
    for step in range(1, 7):
        clock += 0.5
        steps.add(step, value if step in (2, 4, 6) else None, timed=step != 2)
        speeds += [found.steps_per_second for found in steps.finished(left=0)]
    assert speeds == [None, 2.0, 2.0]


def test_a_reading_between_does_not_break_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(in_flight.time, "perf_counter", lambda: clock)
    steps, values, speeds = InFlight(CPU), {"value": torch.zeros(())}, []
    for step in range(1, 5):
        clock += step
        steps.add(step, values, timed=step == 4)
        speeds += [found.steps_per_second for found in steps.finished(left=0)]
    assert speeds == [None, None, None, 4 / (1 + 2 + 3 + 4)]


OFTEN = ("train.log_every=3", "train.eval_every=5", "train.checkpoint_every=4", "train.max_steps=17",
         "train.max_skipped_steps=2")  # fmt: skip


def test_looking_for_skipped_steps_tells_a_sound_run_nothing(tmp_path: Path) -> None:
    for skipped in (2, 50):
        run(tiny_config(*OFTEN, f"train.max_skipped_steps={skipped}"), tmp_path / str(skipped))
    assert learnt(tmp_path / "2") == learnt(tmp_path / "50")


@pytest.mark.parametrize("log_every", [1, 3])
def test_the_host_goes_on_by_a_log_interval(late: None, watch: Watch, tmp_path: Path, log_every: int) -> None:
    run(tiny_config(f"train.log_every={log_every}"), tmp_path, sinks=[watch])
    logged = [1, *range(max(2, log_every), 13, log_every)]
    assert list(watch.at) == logged
    assert watch.at == {step: min(step + log_every, 12) for step in logged}


def test_on_a_cpu_all_is_told_at_once(watch: Watch, tmp_path: Path) -> None:
    run(tiny_config("train.log_every=3"), tmp_path, sinks=[watch])
    assert watch.at == {step: step for step in (1, 3, 6, 9, 12)}


def test_a_mean_loss_is_of_the_steps_since_the_log_step_before(late: None, tmp_path: Path) -> None:
    run(tiny_config("train.max_steps=8"), tmp_path / "each")
    run(tiny_config("train.max_steps=8", "train.log_every=3"), tmp_path / "means")
    each, means = (
        {entry["step"]: entry["loss"] for entry in learnt(tmp_path / name) if "loss" in entry}
        for name in ("each", "means")
    )
    parts = {1: (1,), 3: (2, 3), 6: (4, 5, 6), 8: (7, 8)}
    assert means == pytest.approx({last: fmean(each[step] for step in steps) for last, steps in parts.items()})


def test_what_is_told_and_kept_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(*OFTEN)
    expected, its_result = run(config, tmp_path / "expected")
    kept: list[tuple[int, list[int]]] = []
    save = checkpoint.save

    def watched(folder: Path, step: int, *rest: Any) -> Path:
        kept.append((step, [entry["step"] for entry in learnt(folder.parent) if "loss" in entry]))  # type: ignore[misc]
        return save(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", watched)
    monkeypatch.setattr(in_flight, "mark", lambda device: Late())
    found, result = run(config, tmp_path / "found")
    assert learnt(tmp_path / "found") == learnt(tmp_path / "expected")
    assert [step for step, _ in kept] == [4, 5, 8, 10, 12, 15, 16, 17]
    for step, logged in kept:
        assert logged == [each for each in (1, 3, 6, 9, 12, 15, 17) if each <= step]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    assert (result.train_loss, result.val_loss) == (its_result.train_loss, its_result.val_loss)
    told = [newest_checkpoint(tmp_path / run).state["last_metrics"] for run in ("expected", "found")]
    for metrics in told:
        assert metrics.pop("tokens_per_second") > 0
    assert told[0] == told[1]


@pytest.mark.parametrize("stop_at", [7, 9, 10])  # with a line in flight; at a log step; where an evaluation is due
def test_a_stopped_run_has_told_all_and_goes_on(late: None, watch: Watch, tmp_path: Path, stop_at: int) -> None:
    config, part = tiny_config(*OFTEN), tmp_path / "part"
    whole, _ = run(config, tmp_path / "whole")
    model = build(config)
    before_step(model, watch, stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=f"SIGTERM after step {stop_at}"):
        run_with(model, config, part, sinks=[watch])
    assert list(watch.at) == [step for step in (1, 3, 6, 9) if step <= stop_at]
    resumed, _ = run(config, part, resume=True)
    assert learnt(part) == learnt(tmp_path / "whole")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def raises(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_step_that_fails_takes_no_finished_one_with_it(late: None, watch: Watch, tmp_path: Path) -> None:
    config = tiny_config("train.log_every=3")
    model = build(config)
    before_step(model, watch, 8, raises(ValueError("planted")))
    with pytest.raises(ValueError, match="planted"):
        run_with(model, config, tmp_path, sinks=[watch])
    assert watch.at == {1: 4, 3: 6, 6: 7}


def test_what_fails_behind_a_step_takes_no_finished_one_with_it(
    late: None, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a trace for which the disk has no room."""
    monkeypatch.setattr(StepTrace, "after", lambda _, done: raises(OSError("planted"))() if done == 8 else None)
    with pytest.raises(OSError, match="planted"):
        run(tiny_config("train.log_every=3"), tmp_path, sinks=[watch])
    assert watch.at == {1: 4, 3: 6, 6: 8}


def test_if_the_training_broke_down_before_a_step_failed_that_is_told(late: None, watch: Watch, tmp_path: Path) -> None:
    config = tiny_config("optimizer.lr=1e30", "train.max_steps=200", "train.grad_clip=0", "train.max_skipped_steps=4",
                         "train.log_every=4")  # fmt: skip
    model = build(config)
    before_step(model, watch, 10, raises(ValueError("planted")))
    with pytest.raises(UserError, match="training broke down at step 8"):
        run_with(model, config, tmp_path, sinks=[watch])


def test_a_device_that_fails_says_so_where_it_failed(
    late: None, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("train.log_every=3")
    model = build(config)

    def break_device() -> None:
        monkeypatch.setattr(Late, "wait", raises(RuntimeError("at the mark")))
        raise RuntimeError("in the step")

    before_step(model, watch, 8, break_device)
    with pytest.raises(RuntimeError, match="in the step"):
        run_with(model, config, tmp_path, sinks=[watch])
    assert watch.at == {1: 4, 3: 6}


def test_a_run_that_breaks_down_names_its_step_and_saves_none_after(late: None, watch: Watch, tmp_path: Path) -> None:
    config = tiny_config("optimizer.lr=1e30", "train.max_steps=200", "train.grad_clip=0", "train.max_skipped_steps=4",
                         "train.log_every=4", "train.checkpoint_every=5")  # fmt: skip
    with pytest.raises(UserError, match=r"training broke down at step 8: .* of \d steps in a row"):
        run(config, tmp_path, sinks=[watch])
    assert watch.issued == 10  # where the next checkpoint was due
    assert list(watch.at) == [1, 4]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
    batches = Batches(pattern().train, 16, 4, config.seed, shuffle=True)
    assert torch.equal(load_file(tmp_path / "bad_batch.safetensors")["tokens"], batches.get(7))


def test_a_run_that_breaks_down_between_log_steps_ends_there(late: None, watch: Watch, tmp_path: Path) -> None:
    config = tiny_config("optimizer.lr=1e30", "train.max_steps=200", "train.grad_clip=0", "train.max_skipped_steps=4",
                         "train.log_every=1000")  # fmt: skip
    with pytest.raises(UserError, match=r"training broke down at step 8: .* of \d steps in a row"):
        run(config, tmp_path, sinks=[watch])
    assert watch.issued == 12
    assert list(watch.at) == [1]
    batches = Batches(pattern().train, 16, 4, config.seed, shuffle=True)
    assert torch.equal(load_file(tmp_path / "bad_batch.safetensors")["tokens"], batches.get(7))


class Awaited(EventMark):
    """Nothing is in flight."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.wait()


@pytest.fixture
def deterministic() -> Iterator[None]:
    take_deterministic_kernels()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS may have started without its setting
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_on_a_gpu_the_same_is_told_as_when_every_step_is_awaited(
    deterministic: None, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    config = tiny_config("device=cuda", f"train.compile={mode}", "train.log_every=4", "train.max_steps=40",
                         "train.eval_every=25", "train.checkpoint_every=15")  # fmt: skip
    told = {}
    for name, mark in (("in_flight", in_flight.mark), ("awaited", Awaited)):
        torch.compiler.reset()
        monkeypatch.setattr(in_flight, "mark", mark)
        model = Transformer.for_training(config, load_kernels(default_choice()), "cuda")
        # Some 20 ms, also in a replay: a model of this size is done before the host is.
        model.register_forward_pre_hook(lambda *_: torch.cuda._sleep(40_000_000))
        watch.at.clear()
        run_with(model, config, tmp_path / name, sinks=[watch])
        late = [step for step, issued in watch.at.items() if issued > step]
        assert bool(late) is (name == "in_flight")
        assert all(issued <= step + 4 for step, issued in watch.at.items())
        told[name] = read_metrics(tmp_path / name / "metrics.jsonl")
        for entry in told[name]:
            entry.pop("tokens_per_second", None)
            entry.pop("memory_gib", None)  # the allocator's peak: the second run begins with what the first left
            entry.pop("mfu", None)
    assert [entry["step"] for entry in told["in_flight"] if "loss" in entry] == [1, *range(4, 41, 4)]
    assert told["in_flight"] == told["awaited"]


@pytest.mark.gpu
def test_on_a_gpu_a_mark_is_passed_when_the_work_before_it_is_done() -> None:
    device = torch.device("cuda")
    steps, value = InFlight(device), torch.zeros((), device=device)
    for _ in range(2):  # the first time everything is loaded
        torch.cuda._sleep(1000)
        value += 1
        steps.add(0, {"value": value})
        list(steps.finished(left=0))
    value.zero_()
    torch.cuda.synchronize()
    steps.restart(0)
    begun = time.perf_counter()
    for step in (1, 2, 3, 4):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        value += 1
        steps.add(step, {"value": value} if step % 2 == 0 else None)
    assert not list(steps.finished(left=4))
    issued = time.perf_counter()
    found = [(reading, time.perf_counter()) for reading in steps.finished(left=0)]
    (first, then), (second, at_last) = found
    assert (first.values, second.values) == ({"value": 2.0}, {"value": 4.0})
    assert issued - begun < (then - begun) / 4
    assert first.steps_per_second == pytest.approx(2 / (then - begun), rel=0.1)
    assert second.steps_per_second == pytest.approx(2 / (at_last - then), rel=0.1)
