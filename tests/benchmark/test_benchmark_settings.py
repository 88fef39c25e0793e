"""A benchmark's command line: lists without brackets, and one line for what is mistaken or would not count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmmed.benchmark.settings import OpsSettings, as_lists, compose_benchmark
from llmmed.errors import UserError
from llmmed.kernels import catalog


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose_benchmark(overrides)
    return str(caught.value)


def test_lists_need_no_brackets_and_a_mistake_is_one_line() -> None:
    settings, config = compose_benchmark(["ops=rms_norm,rotary", "sizes=small,base", "dtypes=float16"])
    assert isinstance(settings, OpsSettings)
    assert settings.op_names == ("rms_norm", "rotary")
    assert settings.sizes == ["small", "base"]
    assert config.optimizer.name == "muon"  # so that the optimizer's op is in the workload
    assert as_lists(["ops=[a,b]", "seed=1", "report=a/b,c"]) == ["ops=[a,b]", "seed=1", "report=['a/b',c]"]
    assert "there is no such op" in refused("ops=rmsnorm")
    assert "tiny" in refused("sizes=huge")
    assert "exclude each other" in refused("model=base", "sizes=small")
    assert "does not go together" in refused("benchmark=step", "ops=all")
    assert "seconds=0" in refused("seconds=0")
    assert "no such key" in refused("+minutes=1")
    assert "train.seq_len=1" in refused("train.seq_len=1")
    everything, _ = compose_benchmark()
    assert isinstance(everything, OpsSettings)
    assert everything.op_names == catalog.op_names()


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("train.precision=fp16", "dtypes=float16"),
        ("train.compile=graphs", "modes=eager,graphs"),
        ("benchmark=step kernels=triton", "contestants=ours_auto,ours_graphs"),
        ("benchmark=step kernels.policy=triton", "contestants=ours_auto,ours_graphs"),
        ("benchmark=step train.compile=eager", "contestants=ours_eager,plain_eager"),
        ("benchmark=step optimizer.schedule=wsd", "leave it out"),
        ("benchmark=step optimizer.warmup_steps=3", "leave it out"),
        ("benchmark=step optimizer.min_lr_ratio=0", "leave it out"),
        ("benchmark=step train.activation_checkpointing=block", "contestants=ours_auto"),
        ("benchmark=step contestants=ours_auto,nope", "there are ours_auto, plain_graphs"),
        ("benchmark=step contestants=ours_auto,ours_auto", "ours_auto is there twice"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused(override: str, instead: str) -> None:
    told = refused(*override.split())
    assert told.startswith(override.split()[-1].partition("=")[0])
    assert instead in told
    assert "\n" not in told


def test_what_counts_is_not_refused() -> None:
    ours = "contestants=ours_auto,ours_eager"
    _, config = compose_benchmark(["benchmark=step", ours, "train.activation_checkpointing=block"])
    assert config.train.activation_checkpointing == "block"
    budget = ["benchmark=step", "kernels.memory_budget_gib=9"]
    for own in ([], ["kernels=pytorch"], ["kernels=auto"]):  # contestants need not use it
        assert compose_benchmark(budget, own)[1].kernels.memory_budget_gib == 9
    assert compose_benchmark(["benchmark=step", "train.precision=fp16"])[1].train.precision == "fp16"


def test_the_script_refuses_in_one_line_and_leaves_no_folder(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "scripts" / "benchmark.py"), "ops=rmsnorm"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ops=rmsnorm")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
