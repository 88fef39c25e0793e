"""`benchmark=step`: who runs when and for how long, and who has no place in the comparison."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmmed import compose
from llmmed.benchmark import step
from llmmed.benchmark.contestants import CONTESTANTS, Contestant
from llmmed.benchmark.page import write_page
from llmmed.benchmark.results import OpsResult, StepResult, StepRow
from llmmed.benchmark.settings import StepSettings, compose_benchmark
from llmmed.benchmark.step import _compared
from llmmed.benchmark.step_worker import StepFound, StepJob
from llmmed.reporting import benchmark_plots
from llmmed.reporting.benchmark_plots import GROUPS
from tests.benchmark.samples import STEP, TINY, benchmark, step_result


@pytest.mark.slow
def test_two_contestants_in_processes_of_their_own(tmp_path: Path) -> None:
    result, shown = benchmark(tmp_path, *TINY, *STEP, "contestants=ours_eager,plain_eager,plain_graphs")
    assert isinstance(result, StepResult)
    ours, plain, graphs = result.rows
    for row in (ours, plain):
        assert row.status == "verified", row.reason
        assert len(row.samples) == 3
        assert row.tokens_per_second is not None
        assert row.tokens_per_second_low is not None
        assert row.tokens_per_second_low <= row.tokens_per_second
        assert row.step_ms == pytest.approx(1e3 * 32 / row.tokens_per_second)
        assert row.first_step_seconds is not None
        assert row.first_step_seconds > 0.5  # importing torch alone takes longer
        assert row.device_ms is not None
        assert {"products", "attention", "norm", "rotary", "swiglu", "loss", "optimizer"} <= set(row.device_ms)
        assert set(row.device_ms) <= set(GROUPS)
    assert ours.first_loss == pytest.approx(plain.first_loss, rel=1e-5)
    assert ours.first_gradient_norm == pytest.approx(plain.first_gradient_norm, rel=1e-4)
    assert ours.last_loss == pytest.approx(plain.last_loss, rel=1e-4)
    assert ours.update_rms == pytest.approx(plain.update_rms, rel=1e-2)  # the same optimizer, too
    assert ours.update_rms is not None
    assert ours.update_rms > 1e-5
    assert graphs.status == "unavailable"
    assert "CUDA graphs need a CUDA GPU" in shown
    assert {path.name for path in tmp_path.glob("step*")} == {
        "step.json", "step.csv", "step.png", "step_breakdown.png"
    }  # fmt: skip


def test_what_matters_runs_first_at_every_size_and_a_benchmark_that_is_cut_off_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def process(entry: step._Entry, *_: object) -> StepFound:
        if len(started) == 3:
            raise KeyboardInterrupt
        started.append(f"{entry.config.model.name} {entry.contestant.name}")
        return StepFound(status="verified", samples=[1000.0, 1010.0], first_loss=5.0, first_gradient_norm=1.0)

    monkeypatch.setattr(step._Entry, "_process", process)
    monkeypatch.setattr(Contestant, "why_not", lambda self, device: None)
    sizes = [*(o for o in TINY if not o.startswith("model=")), "sizes=tiny,small"]
    with pytest.raises(KeyboardInterrupt):
        benchmark(tmp_path, *STEP, *sizes)
    assert started == ["tiny ours_auto", "small ours_auto", "tiny plain_graphs"]
    settings, _ = compose_benchmark(["benchmark=step"])
    assert isinstance(settings, StepSettings)
    names = settings.contestants
    assert names == [contestant.name for contestant in CONTESTANTS[: len(names)]]
    assert settings.rounds == 1

    write_page([tmp_path], tmp_path / "page.md")  # what lies there is whole, and says what is missing
    rows = StepResult.model_validate(json.loads((tmp_path / "step.json").read_text())).rows
    assert [row.size for row in rows] == ["tiny"] * len(names) + ["small"] * len(names)
    assert [row.contestant for row in rows if row.status == "verified"] == ["ours_auto", "plain_graphs", "ours_auto"]
    assert {row.reason for row in rows if row.status == "not_tried"} == {"the benchmark ended before it"}
    assert "not tried: the benchmark ended before it" in (tmp_path / "page.md").read_text()


def spied(monkeypatch: pytest.MonkeyPatch, found: StepFound) -> list[StepJob]:
    """The jobs of `benchmark=step`, whose processes are not started: each leaves `found`."""
    jobs: list[StepJob] = []

    @contextlib.contextmanager
    def process(module: str, arguments: list[str], *_: object) -> Iterator[subprocess.Popen[bytes]]:
        jobs.append(StepJob.model_validate_json(Path(arguments[0]).read_text()))
        jobs[-1].result.write_text(found.model_dump_json())
        yield subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(step, "started_process", process)
    monkeypatch.setattr(benchmark_plots, "draw", lambda *_: [])
    return jobs


def test_ours_is_tuned_as_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = StepFound(status="verified", samples=[1000.0], first_loss=5.0, first_gradient_norm=1.0)
    jobs = spied(monkeypatch, found)
    benchmark(tmp_path, *TINY, *STEP, "contestants=ours_auto", "kernels.budget_seconds=33")
    assert compose_benchmark(own=jobs[0].overrides)[1].kernels.budget_seconds == 33
    settings, config = compose_benchmark([*TINY, *STEP, "contestant_seconds=100"])
    default = config.kernels
    assert default == compose.compose(TINY).kernels
    assert isinstance(settings, StepSettings)
    limits = {
        name: step._Entry(each, None, compose_benchmark(TINY, each.overrides)[1])._most_seconds(settings)
        for each in CONTESTANTS if (name := each.name) in ("ours_auto", "ours_eager", "plain_eager")
    }  # fmt: skip
    assert limits == {"ours_auto": 100 + default.budget_seconds, "ours_eager": 100, "plain_eager": 100}


def test_no_process_is_started_that_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = StepFound(status="verified", samples=[1000.0], first_loss=5.0, first_gradient_norm=1.0,
                      first_step_seconds=100.0)  # fmt: skip
    jobs = spied(monkeypatch, found)
    settings, config = compose_benchmark([*TINY, *STEP])
    assert isinstance(settings, StepSettings)

    def started(entry: step._Entry, left: float) -> bool:
        before = len(jobs)
        entry.run(settings, [], tmp_path, tmp_path, 0, time.perf_counter() + left)
        return len(jobs) > before

    late = step._Entry(CONTESTANTS[0], None, config)
    assert not started(late, 29.0)
    assert (late.row().status, late.row().reason) == ("not_tried", "seconds=600 was used up")
    again = step._Entry(CONTESTANTS[0], None, config)
    assert started(again, 31.0)
    again.seconds = 120.0  # as if it had compiled for 100 of them
    assert not started(again, 34.0)
    assert started(again, 36.0)
    assert again.row().rounds == 2


def test_the_label_of_a_size_is_no_contestants_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step._Entry, "_process", lambda *_: StepFound(status="crashed"))
    result, _ = benchmark(tmp_path, *TINY, *STEP, "contestants=plain_fp16,plain_eager")
    assert isinstance(result, StepResult)
    assert [shape.precision for shape in result.shapes] == ["fp32"]


@pytest.mark.parametrize(("accumulation", "told"), [(1, "2 x 16 tokens"), (3, "2 x 16 tokens x 3 micro-batches")])
def test_the_tokens_of_a_step_are_those_of_all_its_micro_batches(
    accumulation: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step._Entry, "_process", lambda *_: StepFound(status="crashed"))
    tokens = f"train.global_batch_tokens={accumulation * 2 * 16}"
    _, shown = benchmark(tmp_path, *TINY, *STEP, "contestants=plain_eager", tokens)
    assert f"M parameters, {told}, fp32" in shown
    write_page([tmp_path], tmp_path / "page.md")
    assert f"{told} a step, fp32" in (tmp_path / "page.md").read_text()


def test_results_from_before_micro_batches_were_told_can_be_read() -> None:
    stored = json.loads(step_result().model_dump_json())
    for shape in stored["shapes"]:
        del shape["micro_batches"]
    assert StepResult.model_validate(stored) == step_result()


def trained(name: str, norm: float = 1.0, last: float = 10.8, update: float = 5e-4) -> StepRow:
    return StepRow(contestant=name, title=f"the {name}", size="base", status="verified", tokens_per_second=1e9,
                   first_loss=10.8, first_gradient_norm=norm, last_loss=last, update_rms=update)  # fmt: skip


def test_who_computes_something_else_is_out_of_the_comparison() -> None:
    rows = _compared([trained("ours_auto"), trained("plain_eager", 1.001), trained("hf_eager", 1.1)])
    assert [each.status for each in rows] == ["verified", "verified", "wrong"]
    assert rows[2].reason == "gradient norm of the first step 1.1; that of the plain_eager is 1.001"
    assert rows[2].tokens_per_second is None
    rows = _compared([trained("ours_auto", last=9.0), trained("plain_eager"), trained("hf_eager")])
    assert [each.status for each in rows] == ["wrong", "verified", "verified"]
    assert "loss of the last warm-up step 9" in rows[0].reason
    for update in (0.0, 4e-4):
        rows = _compared([trained("ours_auto", update=update), trained("plain_eager"), trained("hf_eager")])
        assert [each.status for each in rows] == ["wrong", "verified", "verified"]
        assert "size of the first steps' updates" in rows[0].reason
    apart = [trained("ours_auto", last=10.4), trained("plain_eager"), trained("hf_eager", last=10.4)]
    assert [[each.status for each in _compared(apart, name)].count("wrong") for name in ("adamw", "muon")] == [1, 0]


def test_of_two_the_rival_stays_and_of_several_the_majority() -> None:
    for norm in (1.03, 1.06):
        rows = _compared([trained("ours_auto", norm), trained("hf_eager")])
        assert [each.status for each in rows] == ["wrong", "verified"]
        assert rows[0].reason.startswith("differs from the hf_eager: gradient norm")
        assert "either may be wrong" in rows[0].reason
    rows = _compared([trained("plain_graphs", 5.0), trained("ours_auto"), trained("plain_eager")])
    assert [each.status for each in rows] == ["wrong", "verified", "verified"]
    assert [each.status for each in _compared([trained("ours_auto"), trained("ours_eager", 2.0)])].count("wrong") == 1


@pytest.mark.gpu
def test_on_a_gpu_there_are_ceilings_memory_and_device_times(tmp_path: Path) -> None:
    gpu = [override for override in TINY if not override.startswith("device=")]
    found, _ = benchmark(tmp_path / "ops", *gpu, "ops=rms_norm", "modes=eager,graphs")
    assert isinstance(found, OpsResult)
    rows = {(row.mode, row.implementation): row for row in found.rows}
    for mode in ("eager", "graphs"):
        row = rows[mode, "triton"]
        assert row.status == "verified", row.reason
        assert row.share_of_ceiling is not None
        assert 0 < row.share_of_ceiling < 1.1
        assert row.peak_memory_mib is not None
        assert (row.host_ms is None) == (mode == "graphs")  # a graph is replayed by one call
    assert len(found.ceilings) == 2
    steps, _ = benchmark(tmp_path / "step", *gpu, *STEP, "contestants=ours_graphs,plain_eager,plain_graphs")
    assert isinstance(steps, StepResult)
    for each in steps.rows:
        assert each.status == "verified", each.reason
        assert each.peak_memory_gib is not None
        assert each.device_ms is not None
        assert {"products", "optimizer"} <= {group for group, ms in each.device_ms.items() if ms > 0}
        assert each.largest_kernels
        assert sum(each.largest_kernels.values()) <= 1.01 * sum(each.device_ms.values())
