"""What `scripts/train.py` makes of its arguments before Hydra runs."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from llmmed import cli, compose
from llmmed.errors import UserError
from llmmed.run_folder import read_status
from llmmed.signals import StopRequest


def prepare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert cli._prepare_arguments() is not None
    return sys.argv[1:]


def test_an_experiment_of_one_s_own_folder_is_validated_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "it's mine"
    (folder / "experiment").mkdir(parents=True)
    mine = folder / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\ntrain:\n  max_steps: 3\n")
    given = ["--config-dir", str(folder), "experiment=mine", "device=cpu"]
    assert prepare(monkeypatch, *given)[:4] == given
    mine.write_text("# @package _global_\ntrain:\n  max_steps: -3\n")
    with pytest.raises(UserError, match=r"train\.max_steps=-3"):
        prepare(monkeypatch, *given)


def test_another_name_of_the_configuration_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--config-name=mine: .* --config-dir=<folder> experiment=<name>"):
        prepare(monkeypatch, "--config-name", "mine")


def test_runs_that_begin_at_once_take_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hydra_part = compose.compose_yaml(["seed=1"], with_hydra=True).hydra
    taken = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
        cli._take_folder(None, hydra_part, ["seed=1"])
        override = sys.argv[2]
        taken.append(Path(override.removeprefix("hydra.run.dir=").strip("'")))
    assert taken[1] == Path(f"{taken[0]}-2")
    assert all((folder / ".lock").exists() for folder in taken)


def test_a_folder_that_is_stated_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["hydra.run.dir=run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    cli._take_folder(None, compose.compose_yaml(given, with_hydra=True).hydra, given)
    assert sys.argv == ["train.py", *given]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("no"), "no"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: {folder}"),
        (OSError(errno.EACCES, "Permission denied", "notes.txt"), "Permission denied: notes.txt"),
        (OSError("libcudart.so.13: cannot open shared object file"), "libcudart.so.13: cannot open shared object file"),
        (TimeoutError(), "TimeoutError"),
        (SystemExit("enough"), None),
    ],
)
def test_what_ends_a_resumed_run_puts_its_folder_back(
    error: BaseException, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    config = SimpleNamespace(
        runtime=SimpleNamespace(output_dir=str(tmp_path)), overrides=SimpleNamespace(task=["seed=1"])
    )
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: config)
    monkeypatch.setattr(cli, "_run", fail)
    done: list[str] = []
    with pytest.raises(UserError if told else type(error)) as caught:
        cli._task(OmegaConf.create(), StopRequest(), lambda: done.append("put back"))
    assert done == ["put back"]
    reason = told and told.format(folder=tmp_path)
    assert (read_status(tmp_path).state, read_status(tmp_path).reason) == ("failed" if told else "none", reason)
    assert told is None or str(caught.value) == reason
