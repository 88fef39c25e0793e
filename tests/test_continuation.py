"""`train.resume=<folder>` goes on with what the run was started with, tells what is new, refuses what cannot fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmmed import cli, continuation, run_folder
from llmmed import run as run_module
from llmmed.compose import as_dict, compose_yaml, from_dict
from llmmed.errors import UserError
from llmmed.files import write_json
from llmmed.run import _newest_checkpoint
from llmmed.signals import StopRequest
from tests.processes import run_script
from tests.training.tiny import pattern, run, tiny_config

STARTED = ["experiment=smoke", "data=synthetic", "kernels=pytorch", "model.d_ff=96", "+data@data.sources.more=text"]


def stored(folder: Path, overrides: list[str]) -> Path:
    write_json(folder / ".hydra" / "overrides.yaml", overrides)  # JSON is YAML
    return folder


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], STARTED),
        (["model.d_ff=128", "data=text"], ["experiment=smoke", "kernels=pytorch", STARTED[-1]]),
        (["data@data.sources.more=hub"], STARTED[:-1]),
        (["data.weights.more=5"], STARTED),
        (["+data.weights.more=5"], [o for o in STARTED if "weights" not in o]),
        (STARTED, []),
    ],
)
def test_what_is_given_again_replaces_what_it_was_started_with(
    tmp_path: Path, given: list[str], kept: list[str]
) -> None:
    folder = stored(tmp_path / "a run", [*STARTED, "train.resume=auto"])
    assert run_folder.earlier_overrides([*given, f"train.resume='{folder}'"]) == kept


def test_what_it_was_started_with_may_be_without_use_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(tmp_path / "run", [*STARTED[:2], "train.sample_every=5", "train.sample_tokens=7"])
    write_json(folder / ".hydra" / "config.yaml", {})
    write_json(folder / "checkpoints" / "step_00000002" / "state.json", {"config": as_dict(tiny_config())})
    monkeypatch.setattr(continuation, "changes", lambda *_: [])
    typed = [f"train.resume='{folder}'", "train.sample_every=0"]
    monkeypatch.setattr(sys, "argv", ["train.py", *typed])
    assert cli._prepare_arguments() is not None
    monkeypatch.setattr(sys, "argv", ["train.py", *typed, "train.sample_tokens=8"])
    with pytest.raises(UserError, match=r"train\.sample_tokens is not used by"):
        cli._prepare_arguments()


def test_a_run_refuses_nothing_that_its_command_was_not_refused_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "run", lambda *arguments, **options: 0)
    earlier = ["experiment=smoke", "data=synthetic", "train.sample_tokens=7", "train.sample_every=0"]
    assert cli._run(compose_yaml(earlier), tmp_path, earlier, StopRequest()) == 0


@pytest.mark.parametrize("resume", ["auto", "latest", "null", "nowhere"])
def test_only_a_folder_that_is_named_brings_overrides(
    resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("auto", "latest"):
        stored(tmp_path / name, STARTED)
    assert run_folder.earlier_overrides([f"train.resume={resume}"]) == []
    assert run_folder.earlier_overrides(["seed=1"]) == []


def test_changes_are_told_and_a_misfit_is_refused(tmp_path: Path) -> None:
    config = tiny_config("train.max_steps=2")
    assert continuation.changes(tmp_path, config) == []
    run(config, tmp_path)
    same = tiny_config("train.max_steps=2", "train.micro_batch_size=2", "train.global_batch_tokens=64", "logger=wandb")
    assert continuation.changes(tmp_path, same) == []
    assert continuation.changes(tmp_path, tiny_config("train.max_steps=4", "optimizer.betas=[0.9,0.99]")) == [
        "train.max_steps: 2 -> 4", "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]"]  # fmt: skip
    with pytest.raises(UserError, match=r"is of seed=0 \(here 1\), train\.seq_len=16 \(here 32\); give what"):
        continuation.changes(tmp_path, tiny_config("seed=1", "train.seq_len=32"))
    with pytest.raises(UserError, match=r"is of model\.d_ff=192 \(here 96\), optimizer\.name=adamw \(here muon\)"):
        continuation.changes(tmp_path, tiny_config("model.d_ff=96", "optimizer=muon"))


@pytest.mark.parametrize("key", ["weights", "validation_fraction", "max_documents"])
def test_what_decides_the_tokens_cannot_change(tmp_path: Path, key: str) -> None:
    values: dict[str, tuple[Any, Any]] = {"weights": ({"a": 1.0}, {"a": 2.0}), "validation_fraction": (0.1, 0.2),
                                          "max_documents": (5, 7)}  # fmt: skip
    stored, config = as_dict(tiny_config()), as_dict(tiny_config())
    stored["data"][key], config["data"][key] = values[key]
    write_json(tmp_path / "checkpoints" / "step_00000002" / "state.json", {"config": stored})
    with pytest.raises(UserError, match=rf"is of data\.{key}[.=]"):
        continuation.changes(tmp_path, from_dict(config))


def test_other_data_is_refused(tmp_path: Path) -> None:
    config = tiny_config("train.max_steps=2")
    run(config, tmp_path)
    path = tmp_path / "checkpoints" / "step_00000002"
    continuation.check_data(path, pattern().fingerprint)
    with pytest.raises(UserError, match=r"the data is not that of .*step_00000002: the text, the tokenizer or what is"):
        continuation.check_data(path, "another")
    for override, told in (
        ("data=biomed", r"data\.name=synthetic \(here biomed\)"),
        ("tokenizer.vocab_size=500", r"tokenizer\.vocab_size=\d+ \(here 500\)"),
        ("+data@data.sources.more=text", r"data\.sources=\{\} \(here \{more\}\)"),
    ):
        with pytest.raises(UserError, match=told):
            continuation.changes(tmp_path, tiny_config("train.max_steps=2", "model.vocab_size=2048", override))


def test_a_resume_that_fails_does_not_decide_the_next(tmp_path: Path) -> None:
    folder = stored(tmp_path, STARTED)
    run_folder.write_status(folder, "finished")
    for made_progress in (False, True):
        put_back = run_folder.remember(folder)
        stored(folder, [*STARTED, "data.path=elsewhere"])
        run_folder.write_status(folder, "failed", reason="no such text")
        if made_progress:
            (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
        put_back()
        kept = run_folder.earlier_overrides([f"train.resume='{folder}'"])
        assert ("data.path=elsewhere" in kept) == made_progress
        assert run_folder.read_status(folder).state == ("failed" if made_progress else "finished")


@pytest.mark.parametrize("resume", ["a/run", "auto", "latest"])
def test_where_there_is_nothing_to_go_on_from(tmp_path: Path, resume: str) -> None:
    config = tiny_config("train.max_steps=2", f"train.resume={resume}")
    with (tmp_path / "told").open("w") as file:
        console = Console(file=file, width=300)
        assert _newest_checkpoint(config, tmp_path, console) is None
        run(config, tmp_path)
        path = _newest_checkpoint(config, tmp_path, console)
        assert path == tmp_path / "checkpoints" / "step_00000002"
        (path / "model.safetensors").write_bytes(b"")
        if resume == "auto":
            assert _newest_checkpoint(config, tmp_path, console) is None
        else:
            with pytest.raises(UserError, match=f"train.resume={resume}: no checkpoint in .* is whole"):
                _newest_checkpoint(config, tmp_path, console)
    told = (tmp_path / "told").read_text().splitlines()
    assert len(told) == (2 if resume == "auto" else 1)
    assert all(line.startswith("no whole checkpoint in ") and line.endswith("; starts at step 1") for line in told)


@pytest.mark.slow
def test_the_hint_of_an_interrupted_run_is_all_that_must_be_typed(tmp_path: Path, repository: Path) -> None:
    def train(*overrides: str) -> subprocess.CompletedProcess[str]:
        return run_script(repository / "scripts" / "train.py", overrides, tmp_path)

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    first = train(*STARTED[:4], "hydra.run.dir=run", "train.max_steps=2")
    assert first.returncode == 0, first.stderr
    before = files()
    refused = train("train.resume=run", "model.d_ff=64")
    assert (refused.returncode, files()) == (1, before)
    assert refused.stderr.startswith("error: the checkpoint in run is of model.d_ff=96 (here 64)")
    longer = train("train.resume=run", "train.max_steps=4")
    assert longer.returncode == 0, longer.stderr
    assert "goes on with another value: train.max_steps: 2 -> 4" in longer.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
