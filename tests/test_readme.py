"""The commands of the README, run from top to bottom in an empty folder, made small enough for a CPU."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.processes import run_script

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = ["experiment=smoke", "train.max_steps=2", "train.eval_every=2", "train.eval_tokens=64",
        "train.checkpoint_every=2", "train.compile=eager", "tokenizer.vocab_size=400", "kernels.budget_seconds=1",
        "kernels.on_unavailable=fallback"]  # fmt: skip
SMALL = {  # what is put in place of, or after, a script's own arguments
    "train.py": TINY,
    "verify.py": ["op=rotary", "impl=pytorch"],
    "generate.py": ["max_tokens=4"],
    "benchmark.py": ["sizes=tiny", "train.seq_len=16", "train.micro_batch_size=2", "tokenizer.vocab_size=300",
                     "device=cpu", "seconds=4"],
}  # fmt: skip
STEP = ["contestants=plain_eager", "rounds=1", "blocks=2", "block_steps=1", "warm_up_steps=0", "warm_up_seconds=0",
        "profile_steps=0"]  # fmt: skip
TEXT = ["data=synthetic"]  # of a run that does not say: the default's tokenizer would take most of the time


def readme_commands() -> list[list[str]]:
    lines = re.findall(r"^    (python .+)$", README, re.MULTILINE)
    return [shlex.split(re.sub(r"outputs/<date>/<time>", "RUN", line)) for line in lines]


def shrunk(words: Sequence[str]) -> list[str]:
    """The same command with a tiny model and a few steps; the last value of a key that is given twice counts."""
    script, arguments = Path(words[1]).name, list(words[2:])
    added = list(SMALL.get(script, []))
    if script == "train.py" and not any(a.startswith(("data=", "data.")) for a in arguments):
        added += TEXT
    if script == "train.py" and not any(a.startswith("kernels") for a in arguments):
        added.append("kernels=pytorch")  # the others tune
    if "data=mixture" in arguments:
        added.append("data.sources.biomed.max_documents=1000")
    if "benchmark=step" in arguments:
        added += STEP
    keys = {a.partition("=")[0] for a in added} | ({"model"} if script == "train.py" else set())
    return [*words[:2], *(a for a in arguments if a.partition("=")[0] not in keys), *added]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "my_notes").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy(page, tmp_path / "my_notes" / f"{page.stem}.txt")
    (tmp_path / "someone").mkdir()
    shutil.copytree(tmp_path / "my_notes", tmp_path / "someone" / "notes")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    commands = readme_commands()
    assert len(commands) == 14
    for command in commands:
        words = shrunk([word.replace("RUN", str(newest(tmp_path))) for word in command])
        done = run(words, tmp_path, HF_HUB_OFFLINE="1", COLUMNS="100")
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    assert {path.name for path in newest(tmp_path).iterdir()} >= {"kernels.json", "summary.json", "checkpoints"}
    assert next(tmp_path.glob("outputs/*/*/report.html")).stat().st_size > 10_000
    assert next(tmp_path.glob("outputs/sweeps/*/sweep_summary.png")).stat().st_size > 0
    assert (tmp_path / "my_model" / "model.safetensors").stat().st_size > 0
    for result in ("ops", "step"):
        assert next(tmp_path.glob(f"outputs/benchmarks/*/{result}.json")).stat().st_size > 0


def run(words: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Every script in a process of its own. Those that start no others do so at once."""
    alone = words[1] not in ("scripts/benchmark.py", "scripts/verify.py", "scripts/kill_and_resume.py")
    if alone and "-m" not in words:
        return run_script(Path(words[1]), words[2:], folder, **environment)
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=200,
        env=os.environ | environment,
    )  # fmt: skip


def newest(folder: Path) -> Path:
    """The last run that finished; where there is none yet, no command asks for one."""
    finished = folder.glob("outputs/20*/*/summary.json")
    return max(finished, key=lambda path: path.stat().st_mtime, default=folder / "none" / "none").parent


@pytest.mark.parametrize("target", ["train", "test", "doctor"])
def test_make_runs_what_the_readme_says(target: str, tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").touch()
    told = subprocess.run(
        ["make", "-n", target, "ARGS=seed=1"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    last = {
        "train": "python scripts/train.py kernels=auto model=small seed=1",
        "test": '-m pytest -q -n 2 --dist loadgroup -m "not interpreter and not gpu" seed=1',
        "doctor": "python -m llmmed.doctor seed=1",
    }[target]
    assert any(line.endswith(last) for line in told), told
