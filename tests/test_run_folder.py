"""One process trains in a run folder at a time, and another one is told which."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from llmmed import run_folder, sweep
from llmmed.compose import as_dict, compose, compose_yaml, quoted
from llmmed.errors import UserError
from llmmed.files import read_json, write_json
from tests.training.tiny import tiny_config


@contextmanager
def other_process(folder: Path) -> Iterator[None]:
    """A lock of an open file is another process's as far as the kernel is concerned."""
    with (folder / ".lock").open("w") as file:
        file.write("process 77 on elsewhere")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    with other_process(tmp_path):
        assert run_folder.holder(tmp_path) == "process 77 on elsewhere"
        with pytest.raises(UserError, match=r"process 77 on elsewhere is training in .*; wait for its end"):
            run_folder.hold(tmp_path)
    assert run_folder.holder(tmp_path) is None  # the process is gone, its file is not
    run_folder.hold(tmp_path)
    run_folder.hold(tmp_path)
    assert run_folder.holder(tmp_path) is None
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with (tmp_path / ".lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_where_nothing_can_be_locked_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run_folder.hold(tmp_path)
    assert run_folder.holder(tmp_path) is None
    assert "cannot be locked (No locks available)" in caplog.text
    assert len(caplog.records) == 1


def test_latest_passes_over_a_run_that_is_in_training(tmp_path: Path) -> None:
    config = tiny_config()
    for name in ("older", "newer"):
        folder = tmp_path / "day" / name
        write_json(folder / ".hydra" / "config.yaml", as_dict(config))  # JSON is YAML
        run_folder.write_status(folder, "running")
    os.utime(tmp_path / "day" / "older", (1, 1))
    wanted = replace(config, train=replace(config.train, resume="latest"))
    with other_process(tmp_path / "day" / "newer"):
        assert run_folder.to_resume(wanted, tmp_path) == tmp_path / "day" / "older"
    os.utime(tmp_path / "day" / "older", (1, 1))
    assert run_folder.to_resume(wanted, tmp_path) == tmp_path / "day" / "newer"


def test_latest_finds_a_run_from_before_a_key_was_there(tmp_path: Path) -> None:
    config = tiny_config()
    before = as_dict(config)
    del before["train"]["keep_best"]
    write_json(tmp_path / "run" / ".hydra" / "config.yaml", before)
    run_folder.write_status(tmp_path / "run", "interrupted")
    wanted = replace(config, train=replace(config.train, resume="latest"))
    assert run_folder.to_resume(wanted, tmp_path) == tmp_path / "run"
    with pytest.raises(UserError, match="no unfinished run of this configuration"):
        run_folder.to_resume(replace(wanted, seed=config.seed + 1), tmp_path)


def test_latest_knows_a_path_by_where_it_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("The liver makes bile. " * 2000)
    overrides = ["experiment=smoke", "data=text", "data.path='~/notes.txt'"]
    stored = OmegaConf.to_container(compose_yaml(overrides), resolve=True)
    assert stored["data"]["path"] == "~/notes.txt"  # type: ignore[index,call-overload]
    write_json(tmp_path / "outputs" / "mine" / ".hydra" / "config.yaml", stored)
    run_folder.write_status(tmp_path / "outputs" / "mine", "interrupted")
    config = compose([*overrides, "train.resume=latest"])
    assert run_folder.to_resume(config, tmp_path / "outputs") == tmp_path / "outputs" / "mine"


@pytest.mark.parametrize("path", ["a", "a b", "a'b", "a\\ b", "a\\'b", "a\\\\'b", "a\\", "a,b=[c]", "\\", "'", 'a"b'])
def test_a_quoted_path_is_read_as_it_is(path: str) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([f"hydra.run.dir={quoted(path)}"])
    assert parsed.value() == path


def test_the_words_for_a_resume_can_be_typed_into_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder.resuming(tmp_path / "outputs" / "day") == "train.resume=outputs/day"
    for name in ("seed=1,data.path=d", "it's [a, b]", "größe", "2", "1e3", "true", "null"):
        (typed,) = shlex.split(run_folder.resuming(tmp_path / name))
        assert run_folder._named_to_resume([typed]) == Path(name)


@pytest.mark.parametrize(("name", "kept"), [("a" * 255, 255), ("a" * 256, 200), ("ß" * 130, 200)])
def test_a_jobs_folder_has_a_name_that_file_systems_take(name: str, kept: int, tmp_path: Path) -> None:
    short = [OmegaConf.create({"name": f"${{short_names:'day/{each}'}}"}).name for each in (name, f"{name[:-1]}b")]
    (tmp_path / short[0]).mkdir(parents=True)
    assert short[0] != short[1]
    assert all(each.startswith("day/") for each in short)
    assert len(short[0].removeprefix("day/").encode()[:kept]) == kept
    assert (short[0] == f"day/{name}") == (kept == 255)


def test_an_empty_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"hydra\.run\.dir is empty"):
        run_folder.stated(["seed=1", "hydra.run.dir="])


@pytest.mark.parametrize("name", ["mine", "day/second"])
def test_latest_finds_a_run_where_runs_are(tmp_path: Path, name: str) -> None:
    config = tiny_config()
    wanted = replace(config, train=replace(config.train, resume="latest"))

    def stored(folder: str, state: run_folder.State | None) -> None:
        write_json(tmp_path / folder / ".hydra" / "config.yaml", as_dict(config))
        if state is not None:
            run_folder.write_status(tmp_path / folder, state)

    stored("finished", "finished")
    stored("benchmark", None)
    stored("benchmarks/benchmark", None)
    stored("sweeps/sweep/job", "interrupted")
    with pytest.raises(UserError, match="no unfinished run of this configuration"):
        run_folder.to_resume(wanted, tmp_path)
    stored(name, "interrupted")
    os.utime(tmp_path / name, (1, 1))
    assert run_folder.to_resume(wanted, tmp_path) == tmp_path / name


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["hydra.run.dir=a", "hydra.run.dir='b c'", "seed=1"], Path("b c")),
        (["hydra.run.dir=outputs/${now:%H}"], None),
        (["seed=1"], None),
    ],
)
def test_the_folder_that_is_stated(overrides: list[str], expected: Path | None) -> None:
    assert run_folder.stated(overrides) == expected


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hydra = compose_yaml(with_hydra=True).hydra
    first, second, third = (run_folder.of_this_second(hydra) for _ in range(3))
    assert first is not None
    assert first.is_dir()
    assert (second, third) == (Path(f"{first}-2"), Path(f"{first}-3"))


def test_where_no_folder_can_be_made_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").symlink_to(tmp_path / "unmounted")
    with pytest.raises(FileExistsError, match="outputs"):
        run_folder.of_this_second(compose_yaml(with_hydra=True).hydra)


@pytest.mark.parametrize("named", ["runs/${model.name}", "runs/${now:%Y-%m-%d}", "${hydra:job.name}/${now:%H-%M-%S}"])
def test_a_folder_that_is_not_named_after_a_second_is_left_to_hydra(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder.of_this_second(compose_yaml([f"hydra.run.dir={named}"], with_hydra=True).hydra) is None
    assert not list(tmp_path.iterdir())


def test_a_resume_knows_where_the_run_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "env.json", {"working_folder": str(tmp_path)})
    (tmp_path / "notes.txt").write_text("x")
    resumed, earlier = [f"train.resume={tmp_path}", "optimizer.lr=-1"], ["seed=1", "data.path='notes.txt'"]
    assert run_folder.started_elsewhere(resumed, earlier) == str(tmp_path)
    assert run_folder.started_elsewhere(resumed, ["seed=1"]) is None
    assert run_folder.started_elsewhere(["train.resume=latest"], earlier) is None
    monkeypatch.chdir(tmp_path)
    assert run_folder.started_elsewhere(resumed, earlier) is None


def test_the_environment_of_every_start_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in ("first", "second", "third"):
        monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", start])
        run_folder.write_environment(tmp_path)
    commands = {path.name: read_json(path)["command"][-1] for path in tmp_path.iterdir()}
    assert commands == {"env.1.json": "first", "env.2.json": "second", "env.json": "third"}


def test_a_job_that_an_earlier_sweep_left_running_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hydra_config = OmegaConf.structured(HydraConf)
    hydra_config.job.num, hydra_config.job.override_dirname = 0, "seed=1"
    with other_process(tmp_path):
        assert sweep.run_job(OmegaConf.create(), tmp_path, hydra_config) is None
    assert "job 0: seed=1: process 77 on elsewhere is training it, skipped" in capsys.readouterr().out
    assert not (tmp_path / ".hydra").exists()
