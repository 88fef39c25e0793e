"""What is installed as a library has its YAML files and runs outside the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest


def test_no_dependency_is_named_twice(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lists = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    for name, wanted in lists.items():
        names = [
            re.split(r"[^\w.-]", one)[0].lower().replace("_", "-") for one in wanted if not one.startswith("llmmed")
        ]
        assert sorted(names) == sorted(set(names)), name


@pytest.mark.slow
def test_a_wheel_trains_outside_the_repository(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    subprocess.run(build, cwd=repository, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    configs = {path.relative_to(repository / "configs") for path in (repository / "configs").rglob("*.yaml")}
    installed = tmp_path / "site" / "llmmed"
    assert {path.relative_to(installed / "configs") for path in (installed / "configs").rglob("*.yaml")} == configs

    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path != str(repository)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *filter(None, inherited)])}
    smoke = ["experiment=smoke", "data=synthetic", "kernels=pytorch", "train.max_steps=2", "hydra.run.dir=run"]
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "llmmed.cli", *smoke], cwd=tmp_path / "elsewhere", env=environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where = "import llmmed; print(llmmed.__file__)"
    found = subprocess.run([sys.executable, "-P", "-c", where], env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()) == installed / "__init__.py"
