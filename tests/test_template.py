"""Forks of a template: they are what processes of `started_process` are, and end as those do, whoever ends first."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmmed.autotune.child import processes_to_come
from llmmed.processes import Process, Starter, last_line, started_process
from llmmed.template import STARTS_OVER, Template
from tests.processes import FEW_SECONDS, Tagged

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="templates are for Linux")

_ACTOR = """
import json, os, random, subprocess, sys, tempfile, threading, time, uuid
from llmmed.processes import end_with_parent

def main():
    what, *rest = sys.argv[1:]
    if what != "stay":
        end_with_parent()
    if what == "tell":
        print("to stderr", file=sys.stderr)
        draws = [random.random(), os.path.basename(tempfile.mktemp()), str(uuid.uuid4())]
        if "numpy.random" in sys.modules:
            draws += [sys.modules["numpy.random"].random(), sys.modules["torch"].rand(()).item()]
        print(json.dumps({
            "arguments": rest, "pid": os.getpid(), "session": os.getsid(0), "group": os.getpgrp(),
            "environment": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
            "parent": os.getppid(), "imported": IMPORTED,
            "draws": draws,
            "descriptors": sorted(map(int, os.listdir("/proc/self/fd"))),
            "blocked": [line for line in open("/proc/self/status") if line.startswith(("SigBlk", "SigCgt", "SigIgn"))],
        }))
    elif what == "exit":
        sys.exit(int(rest[0]))
    elif what == "raise":
        raise ValueError("no such tile")
    elif what == "kill":
        os.kill(os.getpid(), int(rest[0]))
    elif what == "leave":
        print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    elif what in ("sleep", "stay"):
        sleeper = subprocess.Popen(["sleep", "60"])
        print(sleeper.pid, flush=True)
        time.sleep(60)

IMPORTED = os.getpid()
print("imported by", IMPORTED)
"""

OWN = {"OPENBLAS_NUM_THREADS": "1", "CHANGED": "in the template"}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which modules are found; `actor` does what its arguments say."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "actor.py").write_text(_ACTOR)
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def template(tmp_path: Path) -> Iterator[Template]:
    with Template.started(["actor"], tmp_path / "template.log", OWN) as template:
        yield template


@pytest.fixture
def result(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What an `actor` tells of itself."""

    def tell(start: Starter, *arguments: str, **variables: str) -> dict[str, Any]:
        log = tmp_path / "told.log"
        with start("actor", ["tell", *arguments], log, variables) as process:
            assert process.wait(FEW_SECONDS) == 0, log.read_text()
        assert "to stderr" in log.read_text()
        told: dict[str, Any] = json.loads(next(line for line in log.read_text().splitlines() if line[0] == "{"))
        return told

    return tell


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + FEW_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def forks_of(template: Template) -> list[int]:
    """With those that have ended and were not waited for."""
    pid = template._process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def seconds_of(template: Template) -> float:
    """On a processor."""
    fields = Path(f"/proc/{template._process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def sleeping(log: Path) -> int:
    """The process that an `actor` has started and waits for."""
    wait_until(lambda: log.exists() and log.read_text())
    return int(log.read_text())


def test_a_fork_is_what_a_process_of_its_own_is(
    template: Template, result: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHANGED", "by the user")
    found = [result(start, "a b", "c", MORE="than that") for start in (started_process, template.started_process)]
    for each in found:
        assert each["arguments"] == ["a b", "c"]
        assert each["pid"] == each["session"] == each["group"]
    spawned, forked = found
    assert spawned["imported"] == spawned["pid"]
    assert forked["imported"] == forked["parent"] == template._process.pid
    for name in ("environment", "descriptors", "blocked"):
        assert forked[name] == spawned[name], name
    assert forked["environment"]["CHANGED"] == "by the user"
    assert forked["environment"]["MORE"] == "than that"


def test_several_are_forked_at_once_and_no_two_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    logs = [tmp_path / f"{number}.log" for number in range(5)]
    modules = ["actor", "numpy.random", "torch"]
    with contextlib.ExitStack() as stack:
        template = stack.enter_context(Template.started(modules, tmp_path / "template.log", OWN))
        start = template.started_process
        processes = [stack.enter_context(start("actor", ["tell", log.name], log)) for log in logs]
        assert [process.wait(FEW_SECONDS) for process in processes] == [0] * 5
        assert forks_of(template) == []
    told = [json.loads(last_line_of(log)) for log in logs]
    assert [each["arguments"] for each in told] == [[log.name] for log in logs]
    assert [each["imported"] for each in told] == [template._process.pid] * 5
    draws = [each["draws"] for each in told]
    assert "imported by" not in "".join(log.read_text() for log in logs)
    assert len(draws[0]) == 5
    for drawn in zip(*draws, strict=True):
        assert len(set(drawn)) == 5


def last_line_of(log: Path) -> str:
    return log.read_text().splitlines()[-1]


def test_nothing_is_left_of_those_that_have_ended(template: Template, tmp_path: Path) -> None:
    def descriptors() -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), template._process.pid))

    found = []
    for _ in range(5):
        with template.started_process("actor", ["exit", "0"], tmp_path / "log") as process:
            assert process.wait(FEW_SECONDS) == 0
        assert forks_of(template) == []
        found.append(descriptors())
    wait_until(lambda: descriptors() <= found[0])
    began = seconds_of(template)
    time.sleep(0.2)
    assert seconds_of(template) - began < 0.1  # it waits


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["exit", "0"], 0), (["exit", "3"], 3), (["raise"], 1), (["kill", "11"], -11), (["kill", "9"], -9)],
)
def test_how_it_ended_is_told(template: Template, tmp_path: Path, arguments: list[str], code: int) -> None:
    with template.started_process("actor", arguments, tmp_path / "log") as process:
        assert process.wait(FEW_SECONDS) == code
    assert process.poll() == process.wait(0) == process.returncode == code
    assert last_line(tmp_path / "log") == ("ValueError: no such tile" if arguments == ["raise"] else "")


def test_its_group_ends_with_it(template: Template, tmp_path: Path) -> None:
    with template.started_process("actor", ["sleep"], tmp_path / "log") as process:
        sleeper = sleeping(tmp_path / "log")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process.poll() is None
        assert process.pid is not None
        assert is_running(process.pid)
        assert is_running(sleeper)
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: not is_running(sleeper))
    assert forks_of(template) == []


def test_it_ends_when_its_standard_input_does(template: Template, tmp_path: Path) -> None:
    with template.started_process("actor", ["sleep"], tmp_path / "log") as process:
        sleeper = sleeping(tmp_path / "log")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(FEW_SECONDS) == -signal.SIGKILL
    wait_until(lambda: not is_running(sleeper))


def test_nobody_waits_for_one_that_has_not_come(modules: Path, tmp_path: Path) -> None:
    (modules / "slow.py").write_text(
        f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists():\n    time.sleep(0.01)\n"
    )
    with Template.started(["slow", "actor"], tmp_path / "template.log", {}) as template:
        began = time.monotonic()
        with template.started_process("actor", ["sleep"], tmp_path / "early") as process:
            assert (process.pid, process.poll()) == (None, None)
        assert process.returncode == -signal.SIGKILL
        assert time.monotonic() - began < 1
        (tmp_path / "go").touch()
        with template.started_process("actor", ["exit", "3"], tmp_path / "log") as later:
            assert later.wait(FEW_SECONDS) == 3
        wait_until(lambda: not forks_of(template))  # the first came, found nobody and ended


def test_all_end_with_the_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        f"import contextlib, pathlib, sys, time\n"
        f"sys.path.insert(0, {str(tmp_path / 'modules')!r})\n"
        f"from llmmed.template import Template\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        f"with contextlib.ExitStack() as stack:\n"
        f"    template = stack.enter_context(Template.started(['actor'], folder / 'template.log', {{}}))\n"
        f"    for what in ('sleep', 'stay'):\n"
        f"        stack.enter_context(template.started_process('actor', [what], folder / what))\n"
        f"    time.sleep(60)\n"
    )
    tagged = Tagged([sys.executable, str(script)], tmp_path)
    tagged.wait_until(lambda: len(tagged.processes()) == 6)  # with the template, two forks, and what they started
    tagged.process.kill()
    assert tagged.process.wait() == -signal.SIGKILL
    tagged.all_end()


def test_what_the_template_takes_along_is_told_and_started_without_it(
    template: Template, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = template.started_process
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    with caplog.at_level("INFO"), contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start("actor", ["sleep"], log)) for log in logs]
        sleepers = [sleeping(log) for log in logs]
        assert [process.poll() for process in processes] == [None, None]
        assert template._process.pid is not None
        os.kill(template._process.pid, signal.SIGKILL)
        for process, sleeper in zip(processes, sleepers, strict=True):
            assert process.wait(FEW_SECONDS) == -signal.SIGKILL
            wait_until(lambda sleeper=sleeper: not is_running(sleeper))
        assert not caplog.records
        for number in range(2):
            with start("actor", ["exit", "3"], tmp_path / f"{number}.log") as other:
                assert other.pid is not None
                assert other.wait(FEW_SECONDS) == 3
    (record,) = caplog.records
    assert "their template was killed by SIGKILL" in record.getMessage()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('a broken installation')", "exit code 1: RuntimeError: a broken installation"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()", "threads"),
        ("import time\ntime.sleep(60)", "killed by SIGKILL"),
    ],
)
def test_without_a_template_processes_are_started_as_ever(
    modules: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, source: str,
    reason: str,
) -> None:  # fmt: skip
    if "sleep(60)" in source:
        monkeypatch.setattr("llmmed.template._PATIENCE", 1.0)
        monkeypatch.setattr("llmmed.template._POLL_SECONDS", 0.1)
    (modules / "broken.py").write_text(source)
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    with caplog.at_level("INFO"), contextlib.ExitStack() as stack:
        template = stack.enter_context(Template.started(["broken"], tmp_path / "template.log", OWN))
        processes: list[Process] = []
        for log in logs:
            process = template.started_process("actor", ["tell", log.name], log, {"MORE": "than that"})
            processes.append(stack.enter_context(process))
        assert [process.wait(FEW_SECONDS) for process in processes] == [0] * 3
    for log, process in zip(logs, processes, strict=True):
        told = json.loads(last_line_of(log))
        assert (told["arguments"], told["pid"], told["parent"]) == ([log.name], process.pid, os.getpid())
        assert told["environment"]["MORE"] == "than that"
        assert "OPENBLAS_NUM_THREADS" not in told["environment"]
    (record,) = caplog.records
    assert reason in record.getMessage()


def test_forks_in_which_something_does_not_work_become_processes_of_their_own(
    modules: Path, tmp_path: Path, result: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    (modules / "actor.py").write_text(
        "import os\nfrom llmmed.template import start_over_unless\n"
        + _ACTOR.replace(
            "def main():\n", "def main():\n    start_over_unless(lambda: {os.getpid(): 'as imported'}[IMPORTED])\n"
        )
    )
    with Template.started(["actor"], tmp_path / "template.log", OWN) as template:
        told = result(template.started_process, "a b", MORE="than that")
        with template.started_process("actor", ["exit", "3"], tmp_path / "log") as process:
            assert process.wait(FEW_SECONDS) == 3
        spawned = result(started_process, "a b", MORE="than that")
        assert told["parent"] == template._process.pid
    assert told["imported"] == told["pid"] == told["session"]  # it has imported for itself
    for name in ("arguments", "environment", "descriptors", "blocked"):
        assert told[name] == spawned[name], name
    assert not caplog.records


def test_in_a_fork_in_which_all_works_nothing_starts_over(modules: Path, tmp_path: Path) -> None:
    (modules / "works.py").write_text(
        "import os\nfrom llmmed.template import start_over_unless\nIMPORTED = os.getpid()\n"
        "def main():\n    start_over_unless(lambda: print('tried'))\n    print(IMPORTED == os.getppid())\n"
    )
    log = tmp_path / "log"
    with Template.started(["works"], tmp_path / "template.log", OWN) as template:
        for start, told in ((template.started_process, "tried\nTrue\n"), (started_process, "False\n")):
            with start("works", [], log) as process:
                assert process.wait(FEW_SECONDS) == 0
            assert log.read_text() == told


def test_a_template_may_wait_for_long_before_it_is_asked(
    template: Template, result: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data may take minutes to prepare."""
    assert result(template.started_process)["parent"] == template._process.pid
    monkeypatch.setattr("llmmed.template._PATIENCE", 2.0)
    time.sleep(2.1)
    assert result(template.started_process)["parent"] == template._process.pid


@pytest.mark.parametrize("what", ["no process can be had", "the request is too long"])
def test_what_cannot_be_forked_is_started_without_the_template_and_the_others_go_on(
    modules: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    (modules / "crowded.py").write_text(
        "import os\nfork, calls = os.fork, []\n"
        "def once():\n"
        "    calls.append(os.getpid())\n"
        "    if len(calls) == 2:\n"
        "        raise BlockingIOError(11, 'too many processes')\n"
        "    return fork()\n" + ("os.fork = once\n" if what.startswith("no") else "")
    )
    long = "x" * (70_000 if what.startswith("the") else 1)
    with caplog.at_level("INFO"), contextlib.ExitStack() as stack:
        template = stack.enter_context(Template.started(["actor", "crowded"], tmp_path / "template.log", OWN))
        first = stack.enter_context(template.started_process("actor", ["sleep"], tmp_path / "first"))
        sleeping(tmp_path / "first")
        second = stack.enter_context(template.started_process("actor", ["exit", "3", long], tmp_path / "second"))
        assert second.wait(FEW_SECONDS) == 3
        third = stack.enter_context(template.started_process("actor", ["exit", "0"], tmp_path / "third"))
        assert third.wait(FEW_SECONDS) == 0
        assert first.poll() is None
        assert len(forks_of(template)) == 1
    (record,) = caplog.records
    assert "their template could not fork" in record.getMessage()


def test_the_number_of_one_that_has_ended_is_forgotten_and_so_is_its_group(template: Template, tmp_path: Path) -> None:
    """It may be another's by the time at which `end` is called. What it left behind has been ended before."""
    with template.started_process("actor", ["leave"], tmp_path / "log") as process:
        left = sleeping(tmp_path / "log")
        assert process.wait(FEW_SECONDS) == 0
        assert process.pid is None
        wait_until(lambda: not is_running(left))


@pytest.mark.gpu
def test_on_a_gpu_forks_of_what_tuning_imports_can_use_it(tmp_path: Path, modules: Path) -> None:
    (modules / "computes.py").write_text(
        "import os, torch\nfrom llmmed.template import start_over_unless\n"
        "def main():\n    start_over_unless(lambda: torch.zeros(1, device='cuda'))\n"
        "    print(os.getppid(), torch.compile(lambda x: x + 1)(torch.ones(3, device='cuda')).sum().item())\n"
    )
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    with processes_to_come("cuda") as start, contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start("computes", [], log)) for log in logs]
        assert [process.wait(120) for process in processes] == [0, 0]
    told = [log.read_text().splitlines()[0].split() for log in logs]  # after it come complaints at exit of torch's own
    parents = {int(parent) for parent, _ in told}
    assert len(parents) == 1
    assert os.getpid() not in parents
    for log, (_, total) in zip(logs, told, strict=True):
        assert total == "6.0"
        assert STARTS_OVER not in log.read_text()
