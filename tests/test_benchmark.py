"""Benchmarks: what they measure, what they leave on disk, and what a wrong or broken candidate looks like in them."""

from __future__ import annotations

import contextlib
import csv
import inspect
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

import llmmed
from llmmed import compose
from llmmed.autotune import warm, worker
from llmmed.autotune.child import Findings
from llmmed.autotune.journal import Job, JournalWriter, Task
from llmmed.autotune.measure import Measurement
from llmmed.autotune.plan import Candidate, Ceilings, Hardware
from llmmed.autotune.verify import Verdict
from llmmed.autotune.workload import record_workload
from llmmed.benchmark import manual, ops, plain_llama, step, step_worker, tables
from llmmed.benchmark.cli import run
from llmmed.benchmark.contestants import CONTESTANTS, Contestant, _Ours, build
from llmmed.benchmark.page import _origin, write_page
from llmmed.benchmark.profiled_groups import group_events, in_range
from llmmed.benchmark.results import OpRow, OpsResult, Origin, Result, StepResult, StepRow, StepShape, write
from llmmed.benchmark.settings import OpsSettings, StepSettings, as_lists, compose_benchmark
from llmmed.benchmark.step import _compared
from llmmed.benchmark.step_worker import StepFound, StepJob
from llmmed.errors import UserError
from llmmed.kernels import catalog
from llmmed.kernels.base import Kernels
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.reporting import benchmark_plots
from llmmed.reporting.benchmark_plots import GROUPS, draw

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from-the-script.md").read_text(encoding="utf-8")
TINY = ["device=cpu", "model=tiny", "tokenizer.vocab_size=300", "train.seq_len=16", "train.micro_batch_size=2"]
STEP = ["benchmark=step", "rounds=1", "blocks=3", "block_steps=1", "warm_up_steps=1", "warm_up_seconds=0"]


def benchmark(folder: Path, *overrides: str) -> tuple[Result, str]:
    written = as_lists(overrides)
    settings, config = compose_benchmark(written)
    console = Console(width=140, record=True)
    return run(settings, config, written, folder, console), console.export_text()


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose_benchmark(overrides)
    return str(caught.value)


# The command line


def test_lists_need_no_brackets_and_a_mistake_is_one_line() -> None:
    settings, config = compose_benchmark(["ops=rms_norm,rotary", "sizes=small,base", "dtypes=float16"])
    assert isinstance(settings, OpsSettings)
    assert settings.op_names == ("rms_norm", "rotary")
    assert settings.sizes == ["small", "base"]
    assert config.optimizer.name == "muon"  # so that the optimizer's op is in the workload
    assert as_lists(["ops=[a,b]", "seed=1", "report=a/b,c"]) == ["ops=[a,b]", "seed=1", "report=['a/b',c]"]
    assert "there is no such op" in refused("ops=rmsnorm")
    assert "tiny" in refused("sizes=huge")
    assert "exclude each other" in refused("model=base", "sizes=small")
    assert "does not go together" in refused("benchmark=step", "ops=all")
    assert "seconds=0" in refused("seconds=0")
    assert "no such key" in refused("+minutes=1")
    assert "train.seq_len=1" in refused("train.seq_len=1")
    everything, _ = compose_benchmark()
    assert isinstance(everything, OpsSettings)
    assert everything.op_names == catalog.op_names()


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("train.precision=fp16", "dtypes=float16"),
        ("train.compile=graphs", "modes=eager,graphs"),
        ("benchmark=step kernels=triton", "contestants=ours_auto,ours_graphs"),
        ("benchmark=step kernels.policy=triton", "contestants=ours_auto,ours_graphs"),
        ("benchmark=step train.compile=eager", "contestants=ours_eager,plain_eager"),
        ("benchmark=step optimizer.schedule=wsd", "leave it out"),
        ("benchmark=step optimizer.warmup_steps=3", "leave it out"),
        ("benchmark=step train.activation_checkpointing=block", "contestants=ours_auto"),
        ("benchmark=step contestants=ours_auto,nope", "there are ours_auto, plain_graphs"),
        ("benchmark=step contestants=ours_auto,ours_auto", "ours_auto is there twice"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused(override: str, instead: str) -> None:
    told = refused(*override.split())
    assert told.startswith(override.split()[-1].partition("=")[0])
    assert instead in told
    assert "\n" not in told


def test_what_counts_is_not_refused() -> None:
    ours = "contestants=ours_auto,ours_eager"
    _, config = compose_benchmark(["benchmark=step", ours, "train.activation_checkpointing=block"])
    assert config.train.activation_checkpointing == "block"
    assert compose_benchmark(["benchmark=step", "train.precision=fp16"])[1].train.precision == "fp16"


def test_the_script_refuses_in_one_line_and_leaves_no_folder(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "scripts" / "benchmark.py"), "ops=rmsnorm"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ops=rmsnorm")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# Ops


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> Iterator[Callable[..., None]]:
    """Installs planted `rms_norm` kernels as a package, and hides the compiler, which would take most of the time."""
    site = tmp_path / "site"

    def install(*names: str) -> None:
        information = site / "planted_kernels-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-kernels\nVersion: 1.0\n")
        points = (f"rms_norm.{name} = planted_kernels:{name.upper()}\n" for name in names)
        (information / "entry_points.txt").write_text(f"[{catalog.ENTRY_POINT_GROUP}]\n{''.join(points)}")
        shutil.copy(repository / "tests" / "autotune" / "planted_kernels.py", site)
        monkeypatch.syspath_prepend(site)
        catalog._entry_points.cache_clear()

    monkeypatch.setenv("PATH", str(tmp_path))
    yield install
    monkeypatch.undo()
    sys.modules.pop("planted_kernels", None)
    catalog._entry_points.cache_clear()


@pytest.mark.slow
def test_every_candidate_has_its_numbers_or_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None]
) -> None:
    plant("right", "wrong", "dies_when_measured")
    passes: list[list[Task]] = []
    real = ops.tune_in_child

    def spy(tasks: list[Task], **given: Any) -> Any:
        passes.append(tasks)
        return real(tasks, **given)

    monkeypatch.setattr(ops, "tune_in_child", spy)
    folder = tmp_path / "out"
    small = [*(o for o in TINY if not o.startswith("model=")), "model.n_layers=1", "sizes=tiny,small"]
    result, shown = benchmark(folder, *small, "ops=rms_norm", "peers=false")
    assert isinstance(result, OpsResult)
    found = {(row.op, row.size, row.implementation): row for row in result.rows}
    assert not [key for key in found if key[2] == "liger"]
    for size in ("tiny", "small"):
        norm, right = found["rms_norm", size, "pytorch"], found["rms_norm", size, "right"]
        assert norm.status == right.status == "verified"
        assert norm.total_ms is not None
        assert right.total_ms is not None
        assert right.speedup == pytest.approx(norm.total_ms / right.total_ms)
        assert right.speedup_low is not None
        assert right.speedup_high is not None
        assert right.speedup_low < right.speedup < right.speedup_high
        wrong, dead = found["rms_norm", size, "wrong"], found["rms_norm", size, "dies_when_measured"]
        assert wrong.status == "wrong"
        assert "relative error" in wrong.reason
        assert dead.status == "crashed"
        assert "SIGSEGV" in dead.reason
        assert wrong.total_ms is dead.total_ms is None
        assert "CUDA" in found["rms_norm", size, "triton"].reason
    assert "x 2x16x384 float32" in found["rms_norm", "small", "pytorch"].shapes
    assert "(at size tiny)" in found["rms_norm", "small", "wrong"].reason

    first, second = ({task.op: task for task in tasks} for tasks in passes)
    assert "pytorch" in first["rms_norm"].verify
    assert set(second["rms_norm"].verify) == set(second["rms_norm"].at_own_calls) == {"pytorch", "right"}
    assert norm.relative_error != found["rms_norm", "tiny", "pytorch"].relative_error

    assert "SIGSEGV" in shown
    assert OpsResult.model_validate(json.loads((folder / "ops.json").read_text())) == result
    with (folder / "ops.csv").open() as file:
        assert [row["implementation"] for row in csv.DictReader(file)] == [row.implementation for row in result.rows]
    assert (folder / "ops_time_float32_eager.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks of `benchmark=ops`, whose processes are not started: what they verify is right and timed."""
    tasks: list[Task] = []

    def child(given: list[Task], **_: object) -> Findings:
        tasks.extend(given)
        error = 1e-3 * len(tasks)
        timed = {"total_ms": 1.0, "total_ms_low": 0.9, "total_ms_high": 1.1}
        ops = {
            task.op: {
                name: known.model_copy(update=timed)
                for name, known in (
                    task.verified
                    | {name: Candidate(status="verified", relative_error=error) for name in task.verify}
                ).items()
            }
            for task in given
        }  # fmt: skip
        return Findings(ops=ops, measured={task.op for task in given}, finished=True)

    monkeypatch.setattr(ops, "tune_in_child", child)
    return tasks


SIZES_OF = ["device=cpu", "train.seq_len=16", "train.micro_batch_size=2", "tokenizer.vocab_size=300", "peers=false"]


def test_nothing_is_timed_at_a_size_at_which_it_was_not_verified(tmp_path: Path, tuned: list[Task]) -> None:
    result, _ = benchmark(tmp_path, *SIZES_OF, "sizes=tiny,small", "ops=rms_norm", "modes=eager,compiled")
    assert isinstance(result, OpsResult)
    tiny, tiny_again, small, small_again = tuned
    assert "pytorch" in tiny.verify
    assert tiny.at_own_calls == []
    assert small.verify == small.at_own_calls == tiny.verify
    for again, before in ((tiny_again, tiny), (small_again, small)):
        assert again.verify == []
        assert set(again.verified) <= set(before.verify)
    errors = {(row.size, row.mode): row.relative_error for row in result.rows if row.implementation == "pytorch"}
    assert errors == {
        ("tiny", "eager"): 1e-3, ("tiny", "compiled"): 1e-3, ("small", "eager"): 3e-3, ("small", "compiled"): 3e-3
    }  # fmt: skip


def test_sizes_with_the_same_calls_have_a_row_each(tmp_path: Path, tuned: list[Task]) -> None:
    size = ["sizes=tiny,small", "model.d_model=64", "model.n_heads=4", "model.d_ff=192"]
    result, shown = benchmark(tmp_path, *SIZES_OF, *size, "ops=rms_norm", "dtypes=float32,bfloat16")
    assert isinstance(result, OpsResult)
    assert len(tuned) == 2  # one for each dtype
    rows = {(row.size, row.dtype): row for row in result.rows if row.implementation == "pytorch"}
    assert set(rows) == {(s, d) for s in ("tiny", "small") for d in ("float32", "bfloat16")}
    assert {row.total_ms for row in rows.values()} == {1.0}
    assert rows["tiny", "float32"].reason == ""
    assert rows["small", "bfloat16"].reason == "the same calls as tiny in bfloat16, measured there"
    assert rows["small", "bfloat16"].relative_error == rows["tiny", "bfloat16"].relative_error
    assert "the same calls as tiny in float32" in shown


def test_the_cases_are_left_out_for_what_has_passed_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, config = compose_benchmark([*TINY, "model.n_layers=1"])
    calls = record_workload(config).by_op()["rms_norm"]
    given: dict[str, Any] = {}

    def judged(op: Any, implementation: Any, *_: object, **named: Any) -> Verdict:
        given[implementation.name] = named["cases"]
        return Verdict("verified", "", 0.0, 0.0, 1)

    monkeypatch.setattr(worker, "verify", judged)
    task = Task.of("rms_norm", calls, ["pytorch", "compiled"], measure=False)
    task = task.model_copy(update={"at_own_calls": ["compiled"]})
    job = Job(journal=tmp_path / "journal", device="cpu", mode="eager", deterministic=False, matmul_precision="highest",
              tasks=[task], seconds=10.0)  # fmt: skip
    with JournalWriter(job.journal) as journal:
        worker.Worker(job, journal).run()
    assert given == {"pytorch": None, "compiled": ()}
    ahead = {(unit.name, unit.call) for unit in warm._units([task], "eager", torch.device("cpu"))}
    assert {call for name, call in ahead if name == "compiled"} == set(calls)


def test_without_time_everything_is_in_the_table_as_not_tried(tmp_path: Path) -> None:
    result, _ = benchmark(tmp_path, *TINY, "ops=rms_norm", "seconds=1e-3")
    assert {row.status for row in result.rows} == {"not_tried", "unavailable"}
    assert all("seconds=0.001 was used up" in row.reason for row in result.rows if row.status == "not_tried")
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_a_benchmark_that_is_killed_leaves_the_ops_that_it_has_done(tmp_path: Path, repository: Path) -> None:
    ours = [*TINY, "ops=swiglu,rms_norm,rotary", "peers=false", "hydra.run.dir=out"]
    command = [sys.executable, str(repository / "scripts" / "benchmark.py"), *ours]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (tmp_path / "out" / "ops.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    result = OpsResult.model_validate(json.loads((tmp_path / "out" / "ops.json").read_text()))
    done = list(dict.fromkeys(row.op for row in result.rows))
    assert done == ["swiglu", "rms_norm", "rotary"][: len(done)]
    assert 1 <= len(done) <= 2, "it was over before it was killed"
    assert next(row for row in result.rows if row.implementation == "pytorch").total_ms is not None
    write_page([tmp_path / "out"], tmp_path / "page.md")
    assert "### swiglu" in (tmp_path / "page.md").read_text()


# Steps


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
    assert ours.last_loss == pytest.approx(plain.last_loss, rel=1e-4)  # the same optimizer, too
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


@pytest.mark.parametrize("width", [80, 140])
def test_the_tables_fit_on_a_terminal_with_every_number_of_a_gpu(width: int) -> None:
    for result in (ops_result([*NAMES, "triton_recompute"], ["linear_cross_entropy"]), step_result()):
        console = Console(width=width, record=True, file=io.StringIO())
        tables.show(result, console)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        told = " ".join(" ".join(lines).split())
        for number in ("1.0e-03", "3.75", "0.500", "0.50", "900") if isinstance(result, OpsResult) else (
            "123,456", "65.5", "45.7", "12.34", "30.5 (9.5)"
        ):  # fmt: skip
            assert number in told, number
        assert "broken: crashed: it | crashed" in told or "unavailable: not installed" in told


def shown(result: Result, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    tables.show(result, console)
    return console.export_text().splitlines()


def test_whole_steps_come_by_speed_beside_compiled_plain_pytorch() -> None:
    whole = step_result()
    speeds = {"ours_auto": 300.0, "plain_graphs": 250.0, "plain_compiled": 200.0, "hf_liger": 500.0}
    rows = [row.model_copy(update={"tokens_per_second": speeds[row.contestant]})
            for row in whole.rows if row.contestant in speeds]  # fmt: skip
    result = whole.model_copy(update={"rows": rows})
    lines = shown(result, 80)
    names = [line.split("  ")[1] for line in lines if re.match(r"  \S+ \S+.* \d", line)]
    assert [name.split(",")[0] for name in names][:2] == ["Hugging Face + Liger", "llmmed"]
    head = next(place for place, line in enumerate(lines) if line.startswith("verified and timed"))
    body = lines[head + 1 : lines.index("", head)]
    assert len(body) > len(rows)  # a name is folded
    assert all(line.startswith("  ") for line in body)
    ratios = ["2.00", "1.20", "1.00", "0.80"]
    assert re.findall(r" (\d\.\d\d) +65\.5", "\n".join(lines)) == ratios
    assert re.findall(r"\| (\d\.\d\d) \| 65\.5", tables.markdown(rows)) == ratios


def test_equal_reasons_are_one_line() -> None:
    one = ops_result(["pytorch"], ["rotary"])
    gone = [one.rows[-1].model_copy(update={"implementation": name, "status": "unavailable", "reason": "no GPU"})
            for name in ("flash", "liger")]  # fmt: skip
    lines = shown(one.model_copy(update={"rows": [one.rows[0], *gone]}), 80)
    assert [line.strip() for line in lines if "no GPU" in line] == ["flash, liger: unavailable: no GPU"]


def test_notes_say_what_is_so() -> None:
    gpu = ops_result(["pytorch", "liger"], ["rotary", "rms_norm"])
    assert "cold cache" in tables.note(gpu)
    assert "they are given in: rotary. They get copies" in tables.note(gpu)
    cpu = gpu.model_copy(update={"rows": [
        row.model_copy(update={"host_ms": None}) for row in gpu.rows if row.implementation == "pytorch"
    ]})  # fmt: skip
    assert "cold cache" not in tables.note(cpu)
    whole = step_result()
    alone = [row for row in whole.rows if not row.contestant.startswith("hf_")]
    assert "gets no mask" in tables.note(whole)
    assert "gets no mask" not in tables.note(whole.model_copy(update={"rows": alone}))
    assert "Liger" not in tables.note(cpu)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_all_contestants_train_the_same(optimizer: str) -> None:
    wanted = [*TINY, f"optimizer={optimizer}", "model.n_kv_heads=2", "optimizer.schedule=constant",
              "optimizer.warmup_steps=0", "train.global_batch_tokens=64"]  # fmt: skip
    tokens = torch.randint(300, (2, 2, 17), generator=torch.Generator().manual_seed(0))
    found = {}
    for contestant in CONTESTANTS:
        if contestant.name not in ("ours_eager", "plain_eager", "hf_eager", "plain_compiled_torch"):
            continue
        if contestant.why_not("cpu"):
            continue  # transformers is not installed, or torch is too old
        contestant = replace(contestant, mode="eager")  # what is compiled computes the same, later
        _, config = compose_benchmark(own=[*wanted, *contestant.overrides])
        trainee = build(contestant, config)
        found[contestant.name] = [tuple(x.item() for x in trainee.step(i, list(tokens))) for i in range(2)]
    first, second = ([found[name][step] for name in found] for step in (0, 1))
    for values in first:
        assert values == pytest.approx(first[0], rel=1e-4)
    # Muon orthogonalises a rival's fused projections as the one matrix that they are to it.
    for values in second:
        assert values == pytest.approx(second[0], rel=1e-4 if optimizer == "adamw" else 0.02)
    assert second[0][0] < first[0][0]


def test_ours_gets_its_kernels_back_from_a_profiler_that_fails() -> None:
    kernels = load_kernels(default_choice())
    set_to: list[Kernels] = []
    ours = object.__new__(_Ours)
    ours._mode, ours._model = "eager", types.SimpleNamespace(kernels=kernels, set_kernels=set_to.append)  # type: ignore[assignment]
    with pytest.raises(RuntimeError), ours.annotated():
        raise RuntimeError
    assert len(set_to) == 2
    assert set_to[-1] is kernels


def test_the_label_of_a_size_is_no_contestants_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step._Entry, "_process", lambda *_: StepFound(status="crashed"))
    result, _ = benchmark(tmp_path, *TINY, *STEP, "contestants=plain_fp16,plain_eager")
    assert isinstance(result, StepResult)
    assert [shape.precision for shape in result.shapes] == ["fp32"]


def test_hugging_face_is_causal_without_a_mask() -> None:
    masks = pytest.importorskip("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    before = masks["sdpa"]
    contestant = next(each for each in CONTESTANTS if each.name == "hf_compiled")
    _, config = compose_benchmark([*TINY, "model.n_layers=1", "benchmark=step"])
    found: list[dict[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        found.extend(node.kwargs for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph.forward

    try:
        trainee = build(contestant, config)
        tokens = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
        model = trainee._model  # type: ignore[attr-defined]
        loss = torch.compile(model, backend=backend)(tokens, tokens)
    finally:
        masks["sdpa"] = before
    assert [(kwargs["is_causal"], kwargs["attn_mask"]) for kwargs in found] == [(True, None)]
    assert loss.item() == pytest.approx(model(tokens, tokens).item(), rel=1e-6)  # as transformers masks by itself


def test_liger_sums_the_heads_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class LigerFusedLinearCrossEntropyFunction:
        @staticmethod
        def forward(
            ctx,
            _input,
            weight,
            target,
            bias=None,
            ce_weight=None,
            ignore_index=-100,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="mean",
            softcap=None,
            return_z_loss=False,
            accum_dtype=None,
        ):
            """As liger-kernel 0.8.5 has it."""

        @classmethod
        def apply(cls, *arguments: Any) -> tuple[torch.Tensor]:
            given.append(inspect.signature(cls.forward).bind(None, *arguments).arguments)
            return (torch.zeros(()),)

    module = types.ModuleType("fused")
    module.LigerFusedLinearCrossEntropyFunction = LigerFusedLinearCrossEntropyFunction  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", module)
    plain_llama._liger_loss(torch.nn.Linear(4, 8, bias=False), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    assert given[0]["accum_dtype"] == torch.float32
    assert (given[0]["ignore_index"], given[0]["reduction"]) == (-100, "mean")


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
        assert row.host_ms is not None
    assert len(found.ceilings) == 2
    steps, _ = benchmark(tmp_path / "step", *gpu, *STEP, "contestants=ours_graphs,plain_eager,plain_graphs")
    assert isinstance(steps, StepResult)
    for each in steps.rows:
        assert each.status == "verified", each.reason
        assert each.peak_memory_gib is not None
        assert each.device_ms is not None
        assert {"products", "optimizer"} <= {group for group, ms in each.device_ms.items() if ms > 0}


def trained(name: str, norm: float = 1.0, last: float = 10.8) -> StepRow:
    return StepRow(contestant=name, title=f"the {name}", size="base", status="verified", tokens_per_second=1e9,
                   first_loss=10.8, first_gradient_norm=norm, last_loss=last)  # fmt: skip


def test_who_computes_something_else_is_out_of_the_comparison() -> None:
    rows = _compared([trained("ours_auto"), trained("plain_eager", 1.001), trained("hf_eager", 1.1)])
    assert [each.status for each in rows] == ["verified", "verified", "wrong"]
    assert rows[2].reason == "gradient norm of the first step 1.1; that of the plain_eager is 1.001"
    assert rows[2].tokens_per_second is None
    rows = _compared([trained("ours_auto", last=9.0), trained("plain_eager"), trained("hf_eager")])
    assert [each.status for each in rows] == ["wrong", "verified", "verified"]
    assert "loss of the last warm-up step 9" in rows[0].reason
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


class Pretender:
    """Trains nothing: its losses and gradient norms are given, the last ones for good."""

    excluded_seconds = 0.0
    plan = None

    def __init__(self, losses: Sequence[float] = (5.0,), norms: Sequence[float] = (1.0,)) -> None:
        self.losses, self.norms, self.indices = list(losses), list(norms), list[int]()

    def step(self, index: int, micro_batches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        made = len(self.indices)
        self.indices.append(index)
        return tuple(torch.tensor(values[min(made, len(values) - 1)]) for values in (self.losses, self.norms))

    def annotated(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def competed(pretender: Pretender, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> StepFound:
    """What the process of a contestant leaves on disk."""
    monkeypatch.setattr(step_worker, "build", lambda contestant, config: pretender)
    monkeypatch.setattr(step_worker, "end_with_parent", lambda: None)
    monkeypatch.setattr(step_worker.os, "_exit", lambda code: None)
    job = StepJob(contestant="plain_eager", overrides=[*TINY, *STEP, *more], started=time.time(),
                  result=folder / "result.json", plan=folder / "plan.json")  # fmt: skip
    job.write(folder / "job.json")
    monkeypatch.setattr(sys, "argv", ["step_worker", str(folder / "job.json")])
    step_worker.main()
    return StepFound.read(folder / "result.json")


@pytest.mark.parametrize(
    ("losses", "norms", "reason"),
    [
        ([float("nan")], [1.0], "first loss is nan, last loss is nan"),
        ([5.0], [float("inf")], "first gradient norm is inf"),
        ([5.0, 5.0, float("nan")], [1.0], "last loss is nan"),
    ],
)
def test_a_loss_that_is_not_finite_is_wrong(
    losses: list[float], norms: list[float], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = competed(Pretender(losses, norms), tmp_path, monkeypatch)
    assert (found.status, found.reason, found.samples) == ("wrong", reason, [])
    odd = StepFound(status="verified", first_loss=float("nan"))
    assert math.isnan(StepFound.model_validate_json(odd.model_dump_json()).first_loss or 0.0)


def test_times_outlive_a_profiler_that_fails_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk: list[StepFound] = []

    def broken(*_: object) -> dict[str, float]:
        on_disk.append(StepFound.read(tmp_path / "result.json"))
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(step_worker, "measure_breakdown", broken)
    found = competed(Pretender(), tmp_path, monkeypatch)
    assert found.reason == "not profiled: RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    assert on_disk[0].reason == "not profiled: the profiler did not end"  # what is left if the process is stopped now
    for each in (found, on_disk[0]):
        assert (each.status, len(each.samples), each.first_loss) == ("verified", 3, 5.0)
    entry = step._Entry(CONTESTANTS[0], None, compose_benchmark([*TINY, *STEP])[1], [found])
    assert entry.row().reason == found.reason
    assert entry.row().tokens_per_second is not None


def test_all_contestants_warm_up_for_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))  # reading it takes a second
    monkeypatch.setattr(step_worker.time, "perf_counter", lambda: float(next(clock)))
    pretender = Pretender()
    competed(pretender, tmp_path, monkeypatch, "warm_up_seconds=9", "profile_steps=0")
    first, warm, timed = 1, 1, 3
    assert len(pretender.indices) == first + warm + 8 + timed


def test_in_fp16_the_first_step_is_made_again_while_its_scale_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretender = Pretender(norms=[float("inf"), float("inf"), 1.0])
    found = competed(pretender, tmp_path, monkeypatch, "train.precision=fp16")
    assert (found.status, found.first_gradient_norm) == ("verified", 1.0)
    assert pretender.indices[:4] == [0, 0, 0, 1]


def test_backward_counts_where_forward_stood() -> None:
    def part(x: torch.Tensor) -> torch.Tensor:
        return torch.cos(x * x)

    x = torch.randn(1000, 1000, requires_grad=True)
    wrapped = in_range(part, "rotary")

    def times(function: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            (F.silu(function(x)) @ x).exp().sum().backward()
        return group_events(list(profiler.events()), on_gpu=False)

    plain, ranged = times(part), times(wrapped)
    assert "rotary" not in plain
    assert plain["swiglu"] > 0  # told by the operator's name
    assert plain["products"] > plain["swiglu"]
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
        wrapped(x)
    forward_alone = group_events(list(profiler.events()), on_gpu=False)["rotary"]
    assert ranged["rotary"] > 1.5 * forward_alone


# What is made of the JSON


def origin() -> Origin:
    hardware = Hardware(device="A GPU", driver="1.0", cuda="13.0", torch="2.11", triton="3.6", python="3.11",
                        cpu="A CPU", cpu_threads=1)  # fmt: skip
    return Origin(date="2000-01-01T00:00:00+00:00", command="python scripts/benchmark.py", commit="abc",
                  changed_files=0, hardware=hardware, packages={"liger-kernel": None}, config={})  # fmt: skip


def origin_on_cpu() -> Origin:
    gpu = origin()
    return gpu.model_copy(update={"hardware": gpu.hardware.model_copy(update={"device": "A CPU", "cuda": None})})


NAMES = ("pytorch", "compiled", "liger", "triton", "cudnn", "flash", "efficient", "mine")


def ops_result(names: Sequence[str], ops: Sequence[str]) -> OpsResult:
    rows = [
        OpRow(op=op, size=size, shapes="x 8x8 bfloat16", dtype="bfloat16", mode="eager", implementation=name,
              status="verified", relative_error=1e-3, forward_ms=1.5 + place, backward_ms=2.25, host_ms=0.5,
              total_ms=3.75 + place, total_ms_low=3.5 + place, total_ms_high=4.0 + place, speedup=3.75 / (3.75 + place),
              speedup_low=0.5, speedup_high=1.5, peak_memory_mib=100.0 * (place + 1), share_of_ceiling=0.5,
              least_ms=1.0)
        for op in ops for size in ("small", "base") for place, name in enumerate(names)
    ]  # fmt: skip
    bad = OpRow(op="rotary", size="small", shapes="x 8x8 bfloat16", dtype="bfloat16", mode="eager",
                implementation="broken", status="crashed", reason="it | crashed")  # fmt: skip
    ceilings = {"small bfloat16 eager": Ceilings(copy_gb_per_second=3000.0, product_tflops={"bfloat16": 800.0})}
    return OpsResult(origin=origin(), seconds=12.0, ceilings=ceilings, rows=[*rows, bad])


def step_result() -> StepResult:
    rows = [
        StepRow(contestant=each.name, title=each.title, size="base", status="verified", rounds=2,
                tokens_per_second=123456.0 + place, tokens_per_second_low=120000.0, tokens_per_second_high=130000.0,
                step_ms=65.5, mfu=0.4567, peak_memory_gib=12.34, first_step_seconds=30.5, first_step_again_seconds=9.5,
                device_ms=dict.fromkeys(GROUPS, 4.0), kernels={"rotary": "triton"})
        for place, each in enumerate(CONTESTANTS[:-1])
    ]  # fmt: skip
    last = CONTESTANTS[-1]
    gone = StepRow(contestant=last.name, title=last.title, size="base", status="unavailable", reason="not installed")
    shape = StepShape(size="base", parameters=123_000_000, batch=32, seq_len=1024, vocabulary=49152, precision="bf16",
                      optimizer="adamw")  # fmt: skip
    return StepResult(origin=origin(), seconds=34.0, shapes=[shape], rows=[*rows, gone])


def test_the_page_and_the_plots_come_from_the_json_alone(tmp_path: Path) -> None:
    write(ops_result(NAMES[:2], ["rotary"]), tmp_path / "a")
    write(step_result(), tmp_path / "b")
    page = tmp_path / "docs" / "results.md"
    write_page([tmp_path / "a", tmp_path / "b"], page)
    text = page.read_text()
    for told in ("A GPU", "torch 2.11", "driver 1.0", "2000-01-01", "commit abc", "python scripts/benchmark.py",
                 "copy 3,000 GB/s", "bfloat16 products 800 TFLOP/s", "crashed: it \\| crashed", "123,456",
                 "120,000-130,000", "45.7", "12.34", "30.5 (9.5)", "unavailable: not installed",
                 "123.0 M parameters", "rotary triton"):  # fmt: skip
        assert told in text, told
    for target in re.findall(r"\]\((\S+?)\)", text):
        assert (page.parent / target).stat().st_size > 0, target
    assert {path.name for path in (tmp_path / "a").glob("*.png")} == {
        "ops_time_bfloat16_eager.png", "ops_speedup_bfloat16_eager.png", "ops_memory_bfloat16_eager.png"
    }  # fmt: skip

    # The same again from what lies beside the page.
    command = re.search(r"report=(\S+) page=(\S+)`", text)
    assert command is not None
    assert command[2] == str(page)
    assert "Python 3.11, A CPU" in text
    assert "; took 34 s" in text
    write_page([Path(folder) for folder in command[1].split(",")], page)
    assert page.read_text() == text

    assert "".join(_origin(origin_on_cpu(), 1.0)).count("A CPU") == 1
    (tmp_path / "a" / "ops.json").write_text("{}")
    with pytest.raises(UserError, match="is not the result of a benchmark"):
        write_page([tmp_path / "a"], page)
    with pytest.raises(UserError, match=r"no ops\.json or step\.json"):
        write_page([tmp_path], page)


def test_pictures_are_of_a_size_that_a_page_can_show(tmp_path: Path) -> None:
    for path in [*draw(ops_result(NAMES, catalog.op_names()), tmp_path), *draw(step_result(), tmp_path)]:
        height, width, _ = matplotlib.image.imread(path).shape
        assert 400 < width < 2000
        assert 300 < height < 2400


def test_every_implementation_has_a_colour_and_a_marker_of_its_own() -> None:
    names = sorted({name for op in catalog.op_names() for name in catalog.implementation_names(op)} | {"mine", "yours"})
    styles = benchmark_plots._styles(ops_result(names, ["attention"]).rows[:-1])
    assert len(set(styles.values())) == len(names)
    assert len({marker for _, marker in styles.values()}) == len(names)
    okabe_and_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"}
    assert {colour for colour, _ in styles.values()} <= {*okabe_and_ito, "#999999"}


@pytest.mark.filterwarnings("error")
def test_a_wide_interval_stays_in_its_panel() -> None:
    whole = step_result()
    wild = whole.rows[0].model_copy(update={"tokens_per_second_high": 500_000.0})
    figure = benchmark_plots._step_figure(whole, [wild, whole.rows[1]])
    figure.canvas.draw()
    speed = figure.axes[0]
    assert speed.get_xlim()[1] > 500
    assert all(text.get_position()[0] < speed.get_xlim()[1] for text in speed.texts)
    benchmark_plots._close(figure)


def test_pictures_of_three_sizes_have_all_of_their_text() -> None:
    names = sorted({name for op in catalog.op_names() for name in catalog.implementation_names(op)})
    two = ops_result(names, ["rotary", "swiglu"])
    large = [row.model_copy(update={"size": "large"}) for row in two.rows if row.size == "base"]
    figures = benchmark_plots._ops_figures(two.model_copy(update={"rows": [*two.rows, *large]}))
    for name, figure in figures.items():
        figure.canvas.draw()
        legend, page = figure.legends[0].get_window_extent(), figure.bbox
        assert page.x0 <= legend.x0, name
        assert legend.x1 <= page.x1, name
        if not name.startswith("ops_time"):
            small, base, last, nothing = figure.axes
            for axis in (base, last):
                assert axis.get_xlabel()
                assert any(label.get_visible() and label.get_text() for label in axis.get_xticklabels())
            assert not small.get_xlabel()
            assert not nothing.get_xlabel()
        benchmark_plots._close(figure)


# At a Python prompt


def test_import_is_light_and_the_functions_are_there() -> None:
    code = "import sys, llmmed; assert 'torch' not in sys.modules and 'hydra' not in sys.modules; print(dir(llmmed))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "benchmark_rms_norm" in done.stdout
    assert {name.removeprefix("benchmark_") for name in llmmed.__all__ if name.startswith("benchmark_")} == set(
        catalog.op_names()
    )
    assert llmmed.benchmark_rotary is manual.benchmark_rotary
    with pytest.raises(AttributeError, match="benchmark_nothing"):
        llmmed.benchmark_nothing  # noqa: B018


SIZES = {"batch_size": 2, "seq_len": 8, "d_model": 32, "n_heads": 2, "d_head": 16, "d_ff": 24, "vocab_size": 40,
         "rows": 16, "cols": 24}  # fmt: skip


def test_all_ops_are_compared_and_the_reason_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manual, "_device", lambda: torch.device("cpu"))
    found = llmmed.manual_kernel_benchmark(**SIZES)
    assert tuple(found) == catalog.op_names()
    shown = capsys.readouterr().out
    for op, each in found.items():
        assert op in shown
        assert set(each) == {"pytorch_time", "triton_time", "speedup", "use_triton", "reason"}
        assert each["pytorch_time"] is not None
        assert each["pytorch_time"] > 0
        if each["triton_time"] is None:
            assert each["speedup"] is None
            assert not each["use_triton"]
            assert "triton: " in each["reason"]
    with pytest.raises(UserError, match="batch_size"):
        llmmed.manual_kernel_benchmark(batchsize=2)


@pytest.mark.interpreter
def test_triton_is_verified_and_timed_in_the_interpreter() -> None:
    found = llmmed.benchmark_rms_norm(batch_size=1, seq_len=4, d_model=32)
    assert found["reason"] == ""
    assert found["triton_time"] is not None
    assert found["pytorch_time"] is not None
    assert found["speedup"] == pytest.approx(found["pytorch_time"] / found["triton_time"])
    assert not found["use_triton"]  # the interpreter is slow


def test_triton_is_used_only_where_it_is_faster_by_more_than_the_noise() -> None:
    def measured(low: float, high: float) -> Measurement:
        return Measurement(0.0, 0.0, (low + high) / 2, low, high, None, None, None)

    clear = manual._judged({"pytorch": measured(2.0, 2.2), "triton": measured(1.0, 1.2)}, {})
    noisy = manual._judged({"pytorch": measured(1.0, 2.0), "triton": measured(0.9, 1.5)}, {})
    assert clear["use_triton"]
    assert clear["speedup"] == pytest.approx(2.1 / 1.1)
    assert not noisy["use_triton"]


def test_kernels_are_selected_from_overrides_and_from_a_configuration() -> None:
    overrides = ["experiment=smoke", "data=synthetic", "device=cpu", "kernels=pytorch"]
    chosen = llmmed.auto_select_kernels(overrides)
    assert chosen == llmmed.auto_select_kernels(compose.compose(overrides))
    assert chosen["rms_norm"] == chosen["rotary"] == "pytorch"
    assert set(chosen) <= set(catalog.op_names())


# The page for those who come from the script


def test_every_override_of_the_page_composes() -> None:
    cells = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("|")]
    found = [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]
    assert len(found) >= 12
    for overrides in found:
        compose.compose(["data=synthetic", "train.seq_len=512", *overrides.split()])


def test_every_benchmark_command_of_the_docs_composes(repository: Path) -> None:
    for page, count in ((PAGE, 3), ((repository / "README.md").read_text(encoding="utf-8"), 2)):
        commands = re.findall(r"^    python scripts/benchmark\.py (.+)$", page, re.MULTILINE)
        assert len(commands) == count
        for command in commands:
            compose_benchmark(shlex.split(command))


@pytest.mark.parametrize(
    "setting",
    ["benchmark_kernels", "use_triton_rmsnorm", "use_triton_rotary", "debug", "benchmark batch", "number of runs"],
)
def test_every_setting_of_the_script_is_on_the_page(setting: str) -> None:
    assert any(setting in line.split("|")[1] for line in PAGE.splitlines() if line.startswith("|"))


def test_every_function_of_the_page_exists() -> None:
    names = re.findall(r"llmmed\.(\w+)\(", PAGE)
    assert len(names) == 4
    assert set(names) <= set(llmmed.__all__)
