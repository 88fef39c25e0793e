"""The HTML report: well-formed, alone in the world, with everything that the folder tells, and safe with any text."""

from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from llmmed.autotune.plan import LastMatch, StepTrial
from llmmed.errors import UserError
from llmmed.reporting import report, report_html
from tests.reporting.test_kernel_table import make_plan
from tests.reporting.test_plan_shares import OPS, plan_with
from tests.reporting.test_sweep_summary import make_job, make_sweep, write

VOID = {"meta", "img", "br", "path", "polyline", "circle"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects the text and what would be loaded."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def make_run(folder: Path, state: str = "finished", reason: str | None = None) -> Path:
    run = make_job(folder, ["model=tiny", "data.path=my notes"], state, reason)
    (run / ".hydra" / "config.yaml").write_text("seed: 0\ndevice: cpu\ntrain:\n  max_steps: 30\n")
    git = {"commit": "abc123", "changed_files": [" M llmmed/run.py"]}
    write(
        run / "env.json", {"command": ["python", "x.py"], "python": "3.11.7", "packages": {"torch": "2.9"}, "git": git}
    )
    (run / "train.log").write_text("".join(f"line {number}\n" for number in range(100)))
    return run


def page_of(folder: Path) -> Page:
    return Page(report.write_report(folder, Console(file=io.StringIO())).read_text(encoding="utf-8"))


def test_a_finished_run_is_told_whole(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    for words in (
        "finished", "7.6398 nats a token", "20,385 tokens/s", "5.12 GiB", "4.7 s after the start",  # result
        "loss (nats a token)", "throughput (tokens/s)", "optimizer step", "training", "validation",  # curves
        "✓ triton", "gradient of weight: relative error 4.0e-01", "0.0412", "1.7e-03", "3.00", "13 calls",  # kernels
        "speed-up over pytorch", "total, ms", "memory, MiB",
        "not that of the commit: 1 file had changes.",
        "git checkout abc123 python scripts/train.py model=tiny 'data.path=my notes'", "M llmmed/run.py",  # reproduce
        "kernels.plan=", "max_steps: 30", "device: cpu", "3.11.7", "torch 2.9", "line 99",
    ):  # fmt: skip
        assert words in page.text, words
    assert "line 5 " not in page.text


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = page_of(run)
    html = (run / "report.html").read_text()
    assert page.loaded == []
    assert not page.tags & {"script", "link", "iframe"}
    assert "@import" not in html
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html


def test_the_step_is_told_with_its_parts_and_its_trials(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    plan = plan_with(OPS, 10.0)
    assert plan.step is not None
    trial = StepTrial(
        op="rotary", name="triton", against="pytorch", status="rejected", reason="within the step's <noise>",
        gain_ms=-0.391, gain_ms_low=-2.5, gain_ms_high=1.97, memory_gain_mib=-3.0,
    )  # fmt: skip
    step = plan.step.model_copy(update={"trials": [trial], "reason": "saves 6 ms", "finished": False})
    plan.model_copy(update={"step": step}).write(run / "kernels.json")
    page = page_of(run)
    for words in (
        "time of a step (ms)", "with these kernels: 10.0 ms", "with PyTorch's: 16.0 ms",
        "1 add_rms_norm 4.00 triton 8.00 pytorch", "everything else 2.50 4.00", "the whole step 10.00 16.00",
        "Not timed, and so not in the bars: of_another_version.", "measured at 1 and 2 layers",
        "Outcome: saves 6 ms.", "in the real step ms a step interval", "kernels.budget_seconds ended the trials",
        "rotary triton pytorch rejected -0.39 -2.50 to +1.97 -3 within the step's <noise>",
    ):  # fmt: skip
        assert words in page.text, words
    assert "rect" in page.tags


def test_a_plan_that_was_given_up_as_a_whole_is_shown_with_its_times(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    plan = plan_with(OPS, 10.0)
    assert plan.step is not None
    match = LastMatch(left=plan.step.chosen, gain_ms=6.0, gain_ms_low=-1.0, gain_ms_high=7.0)
    step = plan.step.model_copy(update={"chosen": plan.step.default, "last_match": match})
    plan.model_copy(update={"step": step}).write(run / "kernels.json")
    assert "these kernels 16.0" in page_of(run).text
    assert "the plan that the trials left 10.0" in page_of(run).text


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "The step as a whole was not measured." in page_of(run).text
    untimed = {name: op.model_copy(update={"candidates": {}}) for name, op in OPS.items()}
    plan_with(untimed, None).model_copy(update={"policy": "pytorch"}).write(run / "kernels.json")
    assert "Not measured: nothing was timed, because nothing was left to choose" in page_of(run).text


def test_samples_are_shown_by_prompt_the_last_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "No text was written" in page_of(run).text
    entries = [{"step": step, "prompt": p, "text": f" beats <{step}>"} for step in (10, 20, 30) for p in ("A", "B")]
    (run / "samples.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 4')
    text = page_of(run).text
    assert "step 30 A beats <30> earlier, 2 of 2 step 10 A beats <10> step 20 A beats <20>" in text
    assert "step 30 B beats <30>" in text


@pytest.mark.parametrize("state", ["failed", "interrupted", "running"])
def test_an_unfinished_run_shows_what_is_there(tmp_path: Path, state: str) -> None:
    page = page_of(make_run(tmp_path / "run", state, "out of <memory> & patience"))
    assert "out of <memory> & patience" in page.text
    assert "the last numbers that it wrote" in page.text
    assert "8.5000 nats a token" in page.text
    assert "No kernels were chosen yet" in page.text
    assert "svg" in page.tags


def test_a_folder_with_only_a_status(tmp_path: Path) -> None:
    write(tmp_path / "status.json", {"state": "failed", "reason": "killed by SIGKILL"})
    page = page_of(tmp_path)
    for words in ("killed by SIGKILL", "No numbers", "No step", "No kernels", "not there", "log is empty"):
        assert words in page.text, words


NAMES = (".hydra/config.yaml", ".hydra/overrides.yaml", "env.json", "kernels.json", "metrics.jsonl", "summary.json")


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_do_not_stop_it(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(b"\xff[{:")
    assert "Environment" in page_of(run).text


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = make_run(tmp_path / evil.replace("/", "-"), "failed", evil)
    write(run / ".hydra" / "overrides.yaml", [f"data.path={evil}"])
    (run / ".hydra" / "config.yaml").write_text(f"data:\n  path: '{evil}'\n")
    (run / "train.log").write_text(evil)
    plan = make_plan()
    candidate = plan.ops["rms_norm"].candidates["triton"].model_copy(update={"reason": evil})
    candidates = plan.ops["rms_norm"].candidates | {"triton": candidate}
    op = plan.ops["rms_norm"].model_copy(update={"candidates": candidates})
    plan.model_copy(update={"ops": plan.ops | {"rms_norm": op}}).write(run / "kernels.json")
    page = page_of(run)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 5


def test_a_sweep_has_one_page_and_a_report_for_each_job(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    page = page_of(sweep)
    for words in ("1 of 4 jobs finished", "kernels=auto seed=1", "not started", "triton: rms_norm", "needs a CUDA GPU"):
        assert words in page.text, words
    assert page.loaded[:3] == ["a/report.html", "nested/b/report.html", "c/report.html"]
    assert all((sweep / name).is_file() for name in page.loaded[:3])
    assert len(page.loaded) == 4 + (sweep / "sweep_curves.png").exists()
    assert all(data.startswith("data:image/png;base64,iVBOR") for data in page.loaded[3:])


def test_a_job_of_a_sweep_says_its_overrides_once_for_each_use(tmp_path: Path) -> None:
    write(tmp_path / "multirun.yaml", {})
    run = make_run(tmp_path / "data.path=my notes,model=tiny")
    headings = page_of(run).text.partition("Result")[0]
    assert headings.count("model=tiny") == 1
    assert f"A job of sweep {tmp_path.name}" in headings
    assert "What was typed" not in page_of(run).text  # the sweep's own process started it
    assert "What was typed" in page_of(make_run(tmp_path / "a" / "b" / "c" / "run")).text


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], [str(tmp_path / "nowhere")], [str(tmp_path)]):
        assert report.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    with pytest.raises(UserError, match="no run folder and no sweep"):
        report.write_report(tmp_path, Console(file=io.StringIO()))


def test_the_command_says_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert report.main([str(run)]) == 0
    assert f"report in {run / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (7.5, 9.1), (3, 3), (0, 0), (-2, -1), (1e-5, 3e-3), (0, 1.4e6), (1, 1 + 1e-15), (5, 1e5)]
)
def test_ticks_are_few_round_and_enclose(low: float, high: float) -> None:
    ticks = report_html._ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-6 * (ticks[1] - ticks[0])
    assert ticks[-1] >= high - 1e-6 * (ticks[1] - ticks[0])
    labels = list(report_html._labels(ticks))
    assert len(set(labels)) == len(labels)


def test_thinning_keeps_a_spike_and_the_order() -> None:
    points = [(float(x), math.sin(x / 500)) for x in range(20_000)]
    points[7777] = (7777.0, 99.0)
    thinned = report_html._thinned(points)
    assert len(thinned) <= 2 * report_html._MOST_POINTS
    assert (7777.0, 99.0) in thinned
    assert thinned == sorted(thinned)
