"""Training: it learns, resumes bit for bit, stops when told to, and its files say what happened."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmmed.data import Batches
from llmmed.errors import UserError
from llmmed.files import read_json, read_metrics
from llmmed.model import Transformer
from llmmed.run import _divergence
from llmmed.run import run as run_everything
from llmmed.run_folder import read_status
from llmmed.signals import Interrupted
from llmmed.training import checkpoint
from llmmed.training.loop import _mean_of_finite, _Run
from llmmed.training.metrics import JsonLines
from tests.training.tiny import SignalsAt, build, newest_checkpoint, pattern, run, run_with, tiny_config

ARGUMENTS = ["experiment=smoke", "data=synthetic", "kernels=pytorch", "model.vocab_size=64", "train.seq_len=16",
             "train.micro_batch_size=4", "train.eval_every=0", "train.log_every=5", "hydra.run.dir=run"]  # fmt: skip


def start(folder: Path, repository: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(repository / "scripts" / "train.py"), *ARGUMENTS, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(entry["step"] >= step for entry in read_metrics(folder / "run" / "metrics.jsonl")):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def test_it_learns_a_certain_pattern(tmp_path: Path) -> None:
    _, result = run(tiny_config("train.max_steps=60", "optimizer.lr=1e-2", "train.eval_every=20"), tmp_path)
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert entries[0]["loss"] == pytest.approx(math.log(64), abs=0.3)
    assert result.train_loss < 0.5
    assert result.val_loss < 0.5
    evaluations = [entry for entry in entries if "val/loss" in entry]
    assert [entry["step"] for entry in evaluations] == [20, 40, 60]
    last = evaluations[-1]
    assert last["val/perplexity"] == pytest.approx(math.exp(last["val/loss"]))
    assert last["val/bits_per_byte"] == pytest.approx(last["val/loss"] / math.log(2) / 2.0)
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("copies", [False, True])
def test_resuming_is_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, copies: bool
) -> None:
    monkeypatch.setattr("llmmed.training.copies.wanted", lambda config, mode: copies)  # as with CUDA graphs
    config = tiny_config("train.checkpoint_every=6", f"optimizer={optimizer}", "train.precision=bf16")
    whole, _ = run(config, tmp_path / "whole")
    assert bool(whole.copies) is copies
    part = tmp_path / "part"
    run(config, part)
    # As if killed after step 8: the checkpoint of step 12 was never written, metrics of steps 7 and 8 were.
    for later in (part / "checkpoints").glob("step_00000012*"):
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    resumed, _ = run(config, part, resume=True)
    for (name, expected), (_, found) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(expected, found), name
    losses = [
        {entry["step"]: entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry}
        for folder in (tmp_path / "whole", part)
    ]
    assert losses[0] == losses[1]
    assert list(losses[1]) == list(range(1, 13))


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(repository: Path) -> None:
    command = [sys.executable, str(repository / "scripts" / "kill_and_resume.py"), "runs=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills (1 while training, 1 while writing a checkpoint, 1 while " in done.stdout
    assert "all bit-identical" in done.stdout


@pytest.mark.gpu
@pytest.mark.timeout(420)
@pytest.mark.parametrize("kernels", ["triton", "pytorch"])
def test_on_a_gpu_killed_and_resumed_with_the_same_bits(repository: Path, kernels: str) -> None:
    command = [sys.executable, str(repository / "scripts" / "kill_and_resume.py"), "runs=2", "device=cuda"]
    done = subprocess.run(
        [*command, "train.deterministic=true", f"kernels={kernels}"], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all bit-identical" in done.stdout


@pytest.mark.gpu
def test_what_a_trace_saw_stays_with_a_run_that_goes_on(tmp_path: Path, repository: Path) -> None:
    def train(*arguments: str) -> tuple[Any, Any]:
        process = start(tmp_path, repository, "train.compile=eager", "device=cuda", *arguments)
        _, errors = process.communicate(timeout=200)
        newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
        assert newest is not None, errors
        plans = read_json(tmp_path / "run" / "kernels.json"), read_json(newest / "state.json")["plan"]
        return plans[0]["executed"], plans[1]["executed"]

    seen, stored = train("train.max_steps=4")
    assert seen
    assert stored == seen
    assert train("train.max_steps=5", "train.resume=run") == (seen, seen)  # too few steps for a trace of its own
    again = ["train.max_steps=7", "train.profile_steps=6", "hydra.run.dir=run"]
    assert train(*again)[0] is None  # all steps but the first are traced for the user


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_ends_it_after_the_step_with_a_checkpoint(
    tmp_path: Path, repository: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, repository, "train.max_steps=100000", "train.checkpoint_every=0")
    wait_for_step(tmp_path, 5, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert number.name in errors
    assert "train.resume=run" in errors
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None


def test_a_signal_after_a_step_waits_for_no_other(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="SIGTERM after step 4"):
        run(tiny_config(), tmp_path, sinks=[SignalsAt(4)])
    assert newest_checkpoint(tmp_path).step == 4


@pytest.mark.parametrize("stop_at", [7, 8])  # between two evaluations; where one is due
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, stop_at: int) -> None:
    config = tiny_config("train.log_every=3", "train.eval_every=4", "optimizer.lr=3e-2")
    whole, expected = run(config, tmp_path / "whole")
    model, steps = build(config), []

    def signal_in_step(*_: object) -> None:
        steps.append(len(steps) + 1)
        if steps[-1] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = model.register_forward_pre_hook(signal_in_step)
    with pytest.raises(Interrupted, match=f"SIGTERM after step {stop_at}"):
        run_with(model, config, tmp_path / "part")
    hook.remove()
    resumed, found = run(config, tmp_path / "part", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    folders = (tmp_path / "whole", tmp_path / "part")
    entries = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    for entry in (*entries[0], *entries[1]):
        entry.pop("tokens_per_second", None)
    assert entries[0] == entries[1]
    assert (found.best_step, found.best_val_loss) == (expected.best_step, expected.best_val_loss)


def test_steps_of_another_size_go_on_in_the_data_where_those_before_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_batches(monkeypatch)
    run(tiny_config("train.max_steps=4"), tmp_path)
    larger = tiny_config("train.max_steps=6", "train.global_batch_tokens=128")
    seen.clear()
    run(larger, tmp_path, resume=True)
    resumed = seen[-4:]  # two steps of two micro-batches; what comes before is the evaluation's
    trained = {
        entry["step"]: entry["tokens"] for entry in read_metrics(tmp_path / "metrics.jsonl") if "tokens" in entry
    }
    assert trained == {1: 64, 2: 128, 3: 192, 4: 256, 5: 384, 6: 512}
    dataset, train = pattern(), larger.train
    batches = Batches(dataset.train, train.seq_len, train.micro_batch_size, larger.seed, shuffle=True)
    assert all(torch.equal(found, batches.get(4 + place)) for place, found in enumerate(resumed))
    run(replace(larger, train=replace(train, max_steps=7)), tmp_path, resume=True)
    assert read_metrics(tmp_path / "metrics.jsonl")[-2]["tokens"] == 640


def test_micro_batches_of_another_size_repeat_and_leave_out_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine windows are no whole number of batches of two."""
    seen = seen_batches(monkeypatch)
    run(tiny_config("train.max_steps=3", "train.micro_batch_size=3"), tmp_path)
    smaller = tiny_config("train.max_steps=5", "train.micro_batch_size=2")
    seen.clear()
    run(smaller, tmp_path, resume=True)
    resumed = torch.cat(seen[-2:])
    windows = Batches(pattern().train, 16, 4, smaller.seed, shuffle=True)
    assert torch.equal(resumed, windows.beginning(9))


def seen_batches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Grows by every batch that is cut from now on: by those of the evaluation first, then by those trained on."""
    seen: list[Tensor] = []
    cut = Batches.beginning
    monkeypatch.setattr(Batches, "beginning", lambda self, first: (seen.append(batch := cut(self, first)), batch)[1])
    return seen


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "too few were made"),
        ({"profiled": 3}, "train.profile_steps took them all"),
        ({"launched": None}, None),
        ({"done": 5}, None),
        ({"plan": {"executed": {"rms_norm": "seen: a_kernel"}}}, None),
    ],
)
def test_a_run_that_was_never_traced_says_so(
    changes: dict[str, Any], told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    facts = {"launched": lambda names: {}, "first": 5, "done": 7, "plan": {"executed": None}, "profiled": 0} | changes
    config = SimpleNamespace(train=SimpleNamespace(profile_steps=facts.pop("profiled")))
    _Run.warn_of_no_trace(SimpleNamespace(config=config, **facts))  # type: ignore[arg-type]
    assert bool(told) == bool(caplog.text)
    assert told is None or told in caplog.text


def test_a_speed_that_nothing_was_timed_for_is_none(tmp_path: Path) -> None:
    _, result = run(tiny_config("train.max_steps=1"), tmp_path)
    assert result.tokens_per_second is None
    assert all("tokens_per_second" not in entry for entry in read_metrics(tmp_path / "metrics.jsonl"))


def test_an_owed_evaluation_is_kept_before_a_signal_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("train.eval_every=4")
    with pytest.raises(Interrupted, match="SIGTERM after step 4"):
        run(config, tmp_path, sinks=[SignalsAt(4)])
    save = checkpoint.save

    def signal_and_save(*arguments: object) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", signal_and_save)
        with pytest.raises(Interrupted, match="SIGTERM before the first step"):
            run(config, tmp_path, resume=True)
    found = newest_checkpoint(tmp_path)
    assert (found.step, found.state["owed"]) == (4, False)
    run(config, tmp_path, resume=True)
    evaluated = [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl") if "val/loss" in entry]
    assert evaluated == [4, 8, 12]


def test_what_is_still_owed_is_not_told_twice(tmp_path: Path) -> None:
    lines = [{"step": 3, "val/loss": 2.0}, {"step": 4, "loss": 1.0}, {"step": 4, "val/loss": 2.0}, {"step": 5}]
    for owed, kept in ((False, lines[:3]), (True, lines[:2])):
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        JsonLines(tmp_path / "metrics.jsonl", from_step=4, owed=owed).close()
        assert read_metrics(tmp_path / "metrics.jsonl") == kept


def test_a_finished_run_keeps_its_times(tmp_path: Path) -> None:
    config = tiny_config()
    _, first = run(config, tmp_path)
    _, again = run(config, tmp_path, resume=True)
    assert first.training_time_seconds > 0
    assert again == replace(first, tokens_per_second=again.tokens_per_second)
    assert "that is all of train.max_steps=12" in (tmp_path / "console.txt").read_text()


def test_a_signal_before_the_first_step_is_done_does_not_wait_for_it(tmp_path: Path) -> None:
    config = tiny_config()
    model = build(config)
    model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM before the first step was done"):
        run_with(model, config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config("train.checkpoint_every=4")
    whole, _ = run(config, tmp_path)
    weights = tmp_path / "checkpoints" / "step_00000012" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    resumed, _ = run(config, tmp_path, resume=True)
    assert "step_00000012 is damaged (model.safetensors does not match" in caplog.text
    assert "going on from the checkpoint of step 8" in (tmp_path / "console.txt").read_text()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_start_in_a_used_folder_keeps_its_own_checkpoints(tmp_path: Path) -> None:
    run(tiny_config("train.keep_last=1"), tmp_path)
    others = {"samples.jsonl", "summary.json", "trace.json.gz"}  # which only a whole run writes
    for name in others:
        (tmp_path / name).write_text("of the first")
    run(tiny_config("train.keep_last=1", "train.max_steps=4"), tmp_path)
    assert not others & {path.name for path in tmp_path.iterdir()}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]
    before = {path.name for path in (tmp_path / "checkpoints.before-1").iterdir()}
    assert before == {"step_00000012", "metrics.jsonl", "loss.png", *others}
    assert read_metrics(tmp_path / "checkpoints.before-1" / "metrics.jsonl")[-1]["step"] == 12
    assert "checkpoints.before-1" in (tmp_path / "console.txt").read_text().replace("\n", "")


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    whole = tiny_config("train.max_steps=4", "train.micro_batch_size=4")
    parts = tiny_config("train.max_steps=4", "train.micro_batch_size=1", "train.global_batch_tokens=64")
    first, _ = run(whole, tmp_path / "whole")
    second, _ = run(parts, tmp_path / "parts")
    logged = [
        [[entry["loss"], entry["grad_norm"]] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]
        for folder in (tmp_path / "whole", tmp_path / "parts")
    ]
    torch.testing.assert_close(torch.tensor(logged[1]), torch.tensor(logged[0]), rtol=1e-4, atol=0)
    for (name, expected), (_, found) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_broken_run_ends_with_one_line_and_its_batch(tmp_path: Path, optimizer: str) -> None:
    config = tiny_config(f"optimizer={optimizer}", "optimizer.lr=1e30", "train.max_steps=200", "train.grad_clip=0",
                         "train.max_skipped_steps=7", "train.global_batch_tokens=128")  # fmt: skip
    with pytest.raises(UserError, match=r"7 steps in a row were not finite; lower optimizer\.lr") as caught:
        run(config, tmp_path)
    assert "bad_batch.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["skipped_steps"] == 6
    tokens = load_file(tmp_path / "bad_batch.safetensors")["tokens"]
    batches = Batches(pattern().train, 16, 4, config.seed, shuffle=True)
    step = int(last["step"])  # from 0, the one that ended it
    assert torch.equal(tokens, torch.cat([batches.get(2 * step), batches.get(2 * step + 1)]))


def test_a_run_that_diverged_is_failed_and_its_files_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("train.max_steps=2", "train.max_skipped_steps=50", "kernels=pytorch")
    init = Transformer.__init__

    def broken(model: Transformer, *arguments: Any, **options: Any) -> None:
        init(model, *arguments, **options)
        with torch.no_grad():
            model.final_norm.fill_(math.inf)

    monkeypatch.setattr(Transformer, "__init__", broken)
    assert run_everything(config, tmp_path, started=0.0) == 1
    assert "training diverged: the validation loss of step 2 is not finite" in str(read_status(tmp_path).reason)
    assert "is the best" not in str(read_status(tmp_path).reason)

    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=pytest.fail)

    summary = strict((tmp_path / "summary.json").read_text())
    assert [summary[key] for key in ("final/train_loss", "final/val_loss", "best/val_loss")] == [None] * 3
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strict(lines[-1])["val/loss"] is None
    state = strict((tmp_path / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert state["last_metrics"]["val/loss"] is None
    JsonLines(tmp_path / "metrics.jsonl", from_step=2).close()  # as a run that goes on opens it
    assert [*map(strict, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [*map(strict, lines)]
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[-1]["val/loss"])
    assert run(config, tmp_path, resume=True)[1].diverged


def test_the_best_checkpoint_is_named_where_there_is_one(tmp_path: Path) -> None:
    _, result = run(tiny_config("train.max_steps=2", "train.eval_every=1"), tmp_path)
    assert f"; the checkpoint of step {result.best_step} is the best" in _divergence(result, tiny_config(), tmp_path)
    assert "is the best" not in _divergence(result, tiny_config(), tmp_path / "elsewhere")


def test_going_on_where_nothing_is_left_to_do_keeps_the_speed(tmp_path: Path) -> None:
    config = tiny_config("train.max_steps=9")
    _, first = run(config, tmp_path)
    _, again = run(config, tmp_path, resume=True)
    assert first.tokens_per_second == again.tokens_per_second > 0


def test_the_loss_of_steps_that_overflowed_is_left_out() -> None:
    losses = torch.tensor([3.0, math.nan, 1.0, math.inf, -math.inf])
    assert float(_mean_of_finite(losses)) == 2.0
    assert math.isnan(_mean_of_finite(losses[1:2]))


def test_a_warm_up_that_is_longer_than_the_run_is_told(tmp_path: Path) -> None:
    run(tiny_config("train.max_steps=1", "optimizer.warmup_steps=3"), tmp_path)
    told = " ".join((tmp_path / "console.txt").read_text().split())
    assert "optimizer.warmup_steps=3 is more than train.max_steps=1: the rate does not reach optimizer.lr" in told


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_too(tmp_path: Path, precision: str) -> None:
    config = tiny_config(f"train.precision={precision}", "train.max_steps=40", "optimizer.lr=1e-2")
    _, result = run(config, tmp_path)
    assert result.train_loss < 2.0
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert ("loss_scale" in entries[0]) == (precision == "fp16")


def test_only_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    # At this rate the loss falls at first and is far above it in the end.
    config = tiny_config("optimizer.lr=0.3", "optimizer.warmup_steps=8", "optimizer.schedule=constant")
    config = replace_train(config, checkpoint_every=3, eval_every=1, keep_last=2, max_steps=12)
    _, result = run(config, tmp_path)
    losses = {e["step"]: e["val/loss"] for e in read_metrics(tmp_path / "metrics.jsonl") if "val/loss" in e}
    assert result.best_val_loss == min(losses.values()) < losses[12]
    assert losses[result.best_step] == result.best_val_loss
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step_{step:08d}" for step in (result.best_step, 9, 12)]


@pytest.mark.parametrize(("every", "written"), [(3, [3, 6, 9, 12]), (1, [*range(1, 13)])])
def test_without_keep_best_the_best_has_no_checkpoint_of_its_own(
    every: int, written: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, *rest: (steps.append(step), save(folder, step, *rest)))
    config = tiny_config("optimizer.lr=0.3", "optimizer.warmup_steps=8", "optimizer.schedule=constant")
    config = replace_train(config, checkpoint_every=every, eval_every=1, keep_last=2, keep_best=False, max_steps=12)
    _, result = run(config, tmp_path)
    assert steps == written
    kept = sorted(int(path.name[-8:]) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == written[-2:]
    assert result.best_step not in kept


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    config = tiny_config("optimizer.lr=0.3", "optimizer.warmup_steps=8", "optimizer.schedule=constant")
    _, result = run(replace_train(config, eval_every=1, patience=3, max_steps=60), tmp_path)
    assert result.steps < 60
    assert result.steps >= result.best_step + 3
    assert newest_checkpoint(tmp_path).step == result.steps


def replace_train(config, **changes):  # type: ignore[no-untyped-def]
    return replace(config, train=replace(config.train, **changes))
