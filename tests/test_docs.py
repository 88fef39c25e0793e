"""The pages in docs/ do what they say: commands exist and compose, and the worked example is followed literally, in a
copy of the project."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from llmmed import compose, generate
from llmmed.autotune import plan as plans
from llmmed.autotune.plan import KernelPlan
from llmmed.benchmark.settings import as_lists, compose_benchmark
from llmmed.errors import UserError
from llmmed.kernels.tunable import MOST_ALTERNATIVES, seen_launches
from llmmed.reporting import kernel_table, verdicts
from tests.processes import run_script
from tests.reporting.test_kernel_table import make_plan

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])
EXAMPLE = "recompute"  # the implementation of the worked example, which this checkout has not
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


def all_commands() -> list[str]:
    """The lines of all pages that a user would type: indented, or in a block of shell."""
    found: dict[str, None] = {}
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        blocks = re.findall(r"```(?:bash|sh)\n(.+?)```", page, re.DOTALL)
        lines = re.findall(r"^    (\S.*)$", page, re.MULTILINE) + [
            line for block in blocks for line in block.splitlines()
        ]
        starts = r"(?:[A-Z_]+=\S+ )*(?:python|make|pip|source)\b"
        found |= dict.fromkeys(line.partition(" #")[0].strip() for line in lines if re.match(starts, line))
    return list(found)


@pytest.fixture
def user_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages take for granted: a folder of text, a plan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_notes").mkdir()
    (tmp_path / "my_notes" / "heart.txt").write_text("The heart pumps blood. " * 1000)
    make_plan().write(tmp_path / "kernels.json")


@pytest.mark.usefixtures("user_files")
@pytest.mark.parametrize("command", all_commands())
def test_every_command_could_be_run(command: str) -> None:
    check(command)


@pytest.mark.usefixtures("user_files")
@pytest.mark.parametrize(
    "command",
    [
        "python scripts/train.py kernel=auto",
        "python scripts/train.py -m model=small,huge",
        "python scripts/absent.py",
        "python scripts/verify.py op=rms_norms",
        "python scripts/benchmark.py sises=small",
        "python -m llmmed.nurse",
        "make tea",
        "make train ARGS=sed=1",
    ],
)
def test_a_command_that_could_not_be_run_is_seen(command: str) -> None:
    with pytest.raises((UserError, AssertionError)):
        check(command)


def check(command: str) -> None:
    """Composes a command, or parses its arguments. Raises `UserError` or `AssertionError` if it could not be run."""
    words = [word for word in shlex.split(re.sub(r"<([^<>]+)>", r"\1", command)) if not re.match(r"[A-Z_]+=1$", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words[1]
        assert len(words) == 2 or words[2].startswith("ARGS=")
        check_arguments("train.py", [word.removeprefix("ARGS=") for word in words[2:]])
    elif words[:2] == ["python", "-m"]:
        found = importlib.util.find_spec(words[2])
        assert found is not None, words[2]
    elif words[0] == "python":
        script = ROOT / words[1]
        assert script.exists(), words[1]
        check_arguments(script.name, words[2:])
    else:
        assert words[0] in ("pip", "source")


def check_arguments(script: str, arguments: list[str]) -> None:
    arguments = [re.sub(rf"={EXAMPLE}$", "=pytorch", argument) for argument in arguments]
    if script == "train.py":
        if any(argument.startswith("hydra/") for argument in arguments):
            return  # launchers and sweepers have values of their own: `test_docs_sweeping.py` composes these
        overrides = [argument for argument in arguments if argument != "-m"]
        lists = [override.partition("=")[2].split(",") for override in overrides]
        for choice in range(max(map(len, lists), default=1)):
            check_overrides([pick(override, choice) for override in overrides])
    elif script == "benchmark.py":
        compose_benchmark(as_lists(arguments))
    elif script == "verify.py":
        verdicts.parse(arguments, torch.device("cpu"))
    elif script == "generate.py":
        generate.parse(arguments)
    else:  # what takes folders or numbers: nothing is written with a dash
        assert not any(argument.startswith("-") for argument in arguments)


def check_overrides(overrides: list[str]) -> None:
    composed = compose.compose_yaml(overrides)
    if compose.asks_for_auto_batch(composed):
        composed = compose.with_micro_batch(composed, 1)
    compose.validate(composed, overrides)


def pick(override: str, choice: int) -> str:
    """One of an override's values, as a sweep takes them."""
    key, _, values = override.partition("=")
    options = values.split(",")
    return f"{key}={options[min(choice, len(options) - 1)]}"


INLINE = re.compile(r"`((?:kernels|train|data|model|optimizer|logger|experiment|tokenizer)(?:\.\w+)*=[^`<,]+)`")


@pytest.mark.usefixtures("user_files")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_override_in_the_text_composes(path: Path) -> None:
    for overrides in dict.fromkeys(INLINE.findall(path.read_text(encoding="utf-8"))):
        check_arguments("train.py", overrides.split())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_and_path_exists(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page):
        assert link.startswith("https://") or (path.parent / link).exists(), link
    for name in re.findall(r"`((?:llmmed|scripts|tests|configs|docs)/[\w./-]+)`", page):
        assert (ROOT / name).exists() or name.endswith(f"/{EXAMPLE}.py"), name


def test_the_time_limits_are_those_of_the_configuration() -> None:
    kernels = compose.compose().kernels
    for path in PAGES:
        for name, seconds in re.findall(r"`kernels\.(\w+_seconds)` \((\d+) s\)", path.read_text(encoding="utf-8")):
            assert float(seconds) == getattr(kernels, name), f"{path.name}: {name}"


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name})" not in readme] == []


def test_every_field_of_the_plan_is_described() -> None:
    page = (DOCS / "reading-kernels-json.md").read_text(encoding="utf-8")
    models = [kind for kind in vars(plans).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    fields = {name for kind in models for name in kind.model_fields}
    assert len(fields) > 50
    assert {name for name in fields if f"`{name}`" not in page} == set()
    statuses = KernelPlan.model_json_schema()["$defs"]["Candidate"]["properties"]["status"]["enum"]
    assert {status for status in statuses if f"`{status}`" not in page} == set()


def test_the_schema_is_up_to_date() -> None:
    stored = json.loads((DOCS / "kernels.schema.json").read_text(encoding="utf-8"))
    assert stored == KernelPlan.model_json_schema(mode="serialization"), "run python scripts/plan_schema.py"


def test_the_table_comes_out_of_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_plan().write(tmp_path / "kernels.json")
    assert kernel_table.main([str(tmp_path / "kernels.json")]) == 0
    printed = capsys.readouterr().out
    assert "\N{CHECK MARK} triton" in printed
    assert "Chosen: triton for rms_norm (3.00x); pytorch for rotary." in " ".join(printed.split())
    assert kernel_table.main([str(tmp_path / "absent.json")]) == 1
    assert kernel_table.main([]) == 1
    assert capsys.readouterr().err.count("error: ") == 2


def test_the_example_of_reading_a_plan_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_plan().write(tmp_path / "kernels.json")
    code = re.search(r"```python\n(.+?)```", (DOCS / "reading-kernels-json.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    told = subprocess.run(
        [sys.executable, "-c", code[1]], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert told.stdout.splitlines()[0] == "rms_norm triton 0.0412 ms: ", told.stderr


def commands(page: str, begins: str) -> list[list[str]]:
    """The words of every command of a page (the blocks that are indented) that begins like this."""
    lines = re.findall(r"^    (\S.*)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in lines if line.startswith(begins)]


def test_the_example_of_launch_parameters_can_be_searched() -> None:
    page = (DOCS / "adding-a-kernel.md").read_text(encoding="utf-8")
    code = re.search(r"## Launch parameters.+?```python\n(.+?)```", page, re.DOTALL)
    call = re.search(r"`(_FORWARD\(.+?\))` gives", page)
    most = re.search(r"\((\d+) at most\)", page)
    assert code is not None
    assert call is not None
    assert most is not None
    assert int(most[1]) == MOST_ALTERNATIVES
    names: dict[str, Any] = {"__name__": "example", "x": torch.empty(2, 300), "width": 300}
    exec(code[1], names)
    with seen_launches() as seen:
        assert eval(call[1], names) == (256, 4)
    ((site, values),) = seen.items()
    assert names["_FORWARD"].default(torch.device("cpu"), site) == values
    assert len(names["_FORWARD"].alternatives(torch.device("cpu"), site)) == 2


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

    for verify in commands("adding-a-kernel.md", "python scripts/verify.py"):
        verified = copy.run(verify)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert re.search(r"swiglu +recompute +float32 +verified", verified.stdout)

    dry_run, pinned = commands("adding-a-kernel.md", "python scripts/train.py")
    listed = copy.run(dry_run)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    candidate = KernelPlan.read(copy.newest_run() / "kernels.json").ops["swiglu"].candidates["recompute"]
    assert candidate.status == "verified"
    assert candidate.total_ms is not None
    reason = candidate.reason
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

    # The mistake that the page suggests is seen by the generic tests, and by a run that asks for it.
    mistake = re.search(r"write `(dgate = .+?)` instead", page)
    assert mistake is not None
    wrong = re.sub(r"dgate = .+", mistake[1], code[1])
    assert wrong != code[1]
    (tmp_path / path[1]).write_text(wrong, encoding="utf-8")
    refused = copy.run(generic)
    assert refused.returncode == 1
    assert re.search(r"status='wrong', reason=.gradient of gate", refused.stdout), refused.stdout
    forced = copy.run(pinned)
    assert forced.returncode == 1
    assert "not used because it is wrong" in forced.stderr


@pytest.mark.parametrize("script", ["train", "benchmark"])
def test_help_lists_what_one_may_choose(script: str, tmp_path: Path, repository: Path) -> None:
    done = run_script(repository / "scripts" / f"{script}.py", ["--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\nkernels: auto, pytorch, triton\n" in done.stdout
    assert "\ndata: biomed, " in done.stdout
    assert " _" not in done.stdout.partition("Keys and their values")[0]
    assert ("\nbenchmark: ops, step\n" in done.stdout) == (script == "benchmark")


SCRIPTS = ["calibrate_gate", "export_hf", "generate", "kernel_table", "kill_and_resume", "regret", "report", "verify"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_is_for(script: str, tmp_path: Path, repository: Path) -> None:
    done = run_script(repository / "scripts" / f"{script}.py", ["--help"], tmp_path)
    assert done.returncode == 0
    assert f"scripts/{script}.py" in done.stdout
