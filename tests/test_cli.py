"""What `scripts/train.py` makes of its arguments before Hydra runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmmed import cli
from llmmed.errors import UserError


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
