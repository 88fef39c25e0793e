"""The pages in docs/ do what they say: the worked example is followed literally, in a copy of the project."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
COPIED = ("llmmed", "configs", "scripts", "tests", "pyproject.toml")
LEFT_BEHIND = ("outputs", "__pycache__", ".pytest_cache")


class Copy:
    """A copy of the project, in which commands run as a user would type them."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source, target = repository / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
            else:
                shutil.copy(source, target)

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        assert command[0] == "python"
        environment = os.environ | {"PYTHONPATH": str(self.folder), "COLUMNS": "160"}
        return subprocess.run(
            [sys.executable, *command[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=250,
        )

    def files(self) -> dict[str, str]:
        """Relative path -> hash, without what runs leave behind."""
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not set(LEFT_BEHIND) & set(path.relative_to(self.folder).parts)
        }

    def newest_run(self) -> Path:
        return max(self.folder.glob("outputs/*/*"), key=lambda path: path.stat().st_mtime)


def commands(page: str, begins: str) -> list[list[str]]:
    """The words of every command of a page (the blocks that are indented) that begins like this."""
    lines = re.findall(r"^    (\S.*)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in lines if line.startswith(begins)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_adding_a_kernel(tmp_path: Path, repository: Path) -> None:
    """One new file: verified, timed, listed with its reason, used where it is pinned, logged, tested."""
    page = (DOCS / "adding-a-kernel.md").read_text(encoding="utf-8")
    path = re.search(r"`(llmmed/kernels/swiglu/\w+\.py)`:", page)
    code = re.search(r"```python\n(.+?)```", page, re.DOTALL)
    assert path is not None
    assert code is not None
    copy = Copy(repository, tmp_path)
    before = copy.files()
    (tmp_path / path[1]).write_text(code[1], encoding="utf-8")

    (verify,) = commands("adding-a-kernel.md", "python scripts/verify.py")
    verified = copy.run(verify)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert re.search(r"swiglu +recompute +float32 +verified", verified.stdout)

    dry_run, pinned = commands("adding-a-kernel.md", "python scripts/train.py")
    listed = copy.run(dry_run)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    candidates = json.loads((copy.newest_run() / "kernels.json").read_text())["ops"]["swiglu"]["candidates"]
    assert candidates["recompute"]["status"] == "verified"
    assert candidates["recompute"]["total_ms"] > 0
    reason = candidates["recompute"]["reason"]
    assert reason.startswith(("fastest", "slower", "within", "gains", "best in the step", "the step"))
    assert re.search(rf"recompute +verified +\S+ +\S+ +\S+ +{re.escape(reason[:20])}", listed.stdout), listed.stdout

    used = copy.run(pinned)
    assert used.returncode == 0, used.stdout + used.stderr
    assert json.loads((copy.newest_run() / "summary.json").read_text())["kernels/swiglu"] == "recompute"

    (generic,) = commands("adding-a-kernel.md", "python -m pytest")
    tested = copy.run(generic)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert re.search(r"[1-9]\d* passed", tested.stdout)

    after = copy.files()
    assert {name for name in after if after[name] != before.get(name)} == {path[1]}

    # The mistake that the page suggests is seen by the gate, and so by the generic tests.
    mistake = re.search(r"write `(dgate = .+?)` instead", page)
    assert mistake is not None
    wrong = re.sub(r"dgate = .+", mistake[1], code[1])
    assert wrong != code[1]
    (tmp_path / path[1]).write_text(wrong, encoding="utf-8")
    refused = copy.run(generic)
    assert refused.returncode == 1
    assert re.search(r"status='wrong', reason=.gradient of gate", refused.stdout), refused.stdout
