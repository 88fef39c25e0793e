"""A sweep's comparison: told from the folders alone, whatever happened to the jobs."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmmed.reporting import sweep_summary
from tests.reporting.test_kernel_table import make_plan

SUMMARY = {
    "tokens_per_second": 20384.6,
    "mfu": None,
    "peak_memory_gib": 5.125,
    "final/train_loss": 7.6377,
    "final/val_loss": 7.6398,
    "steps": 30,
    "time_to_first_step_seconds": 4.74,
    "training_time_seconds": 0.93,
}
METRICS = [
    {"step": 1, "loss": 9.0, "tokens_per_second": 0.0},
    {"step": 10, "loss": 8.0, "tokens_per_second": 100.0},
    {"step": 10, "val/loss": 8.5},
    {"step": 20, "loss": 7.5, "tokens_per_second": 300.0},
]


def make_job(folder: Path, overrides: list[str], state: str, reason: str | None = None, pid: int = 1) -> Path:
    """A run folder as a run leaves it, with a summary if it finished and metrics in any case."""
    (folder / ".hydra").mkdir(parents=True)
    write(folder / ".hydra" / "overrides.yaml", overrides)
    write(folder / "status.json", {"state": state, "reason": reason, "pid": pid, "updated": "2026-01-31T12:00:00"})
    write(folder / "env.json", {"host": platform.node()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in METRICS) + '{"step": 2')
    if state == "finished":
        write(folder / "summary.json", SUMMARY)
        make_plan().write(folder / "kernels.json")
    return folder


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def make_sweep(folder: Path) -> Path:
    """Four jobs planned: one finished, one failed with a reason, one killed, one never started."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    jobs = [[f"kernels={kernels}", f"seed={seed}", "model=tiny"] for kernels in ("auto", "triton") for seed in (1, 2)]
    make_job(folder / "a", jobs[0], "finished")
    make_job(folder / "nested/b", jobs[1], "running", pid=gone.pid)
    make_job(folder / "c", jobs[2], "failed", "kernels=triton: needs a CUDA GPU | sorry")
    target = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    overrides = {"task": ["kernels=auto,triton", "seed=1,2", "model=tiny"]}
    write(folder / "multirun.yaml", {"hydra": {"overrides": overrides, "sweeper": {"_target_": target}}})
    return folder


def test_every_job_is_told_in_the_order_of_the_sweep(tmp_path: Path) -> None:
    first, killed, failed, missing = sweep_summary.summarize_sweep(make_sweep(tmp_path))
    assert [j.job for j in (first, killed, failed, missing)] == [
        f"kernels={kernels} seed={seed}" for kernels in ("auto", "triton") for seed in (1, 2)
    ]
    assert first.status == "finished"
    assert first.kernels == {"rms_norm": "triton"}
    assert (first.tokens_per_second, first.peak_memory_gib, first.val_loss) == (20384.6, 5.125, 7.6398)
    assert killed.status == "failed"
    assert "ended without a word" in (killed.reason or "")
    assert (killed.steps, killed.train_loss, killed.val_loss, killed.tokens_per_second) == (20, 7.5, 8.5, 200.0)
    assert killed.folder == "nested/b"
    assert (failed.status, failed.reason) == ("failed", "kernels=triton: needs a CUDA GPU | sorry")
    assert failed.kernels is None
    assert missing.status == "not started"
    assert "hydra.sweep.dir" in (missing.reason or "")


def test_a_process_that_lives_is_still_running(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a", ["seed=1"], "running", pid=os.getpid())
    assert sweep_summary.summarize_run(job).status == "running"


def test_a_process_of_another_machine_is_believed(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a", ["seed=1"], "running", pid=2**22 + 1)
    assert sweep_summary.summarize_run(job).status == "failed"
    write(job / "env.json", {"host": "elsewhere"})
    assert sweep_summary.summarize_run(job).status == "running"


def test_the_summary_of_an_earlier_run_in_the_folder_does_not_count(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a", ["seed=1"], "failed", "out of memory")
    write(job / "summary.json", SUMMARY)
    assert sweep_summary.summarize_run(job).train_loss == 7.5


def test_speed_and_utilisation_of_an_unfinished_run_are_of_the_same_interval(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a", ["seed=1"], "interrupted")
    speeds = [0.0, 300.0, 200.0, 50.0]
    entries = [{"step": 1, "loss": 9.0}] + [
        {"step": 10 * place, "tokens_per_second": speed, "mfu": speed / 1000} for place, speed in enumerate(speeds)
    ]
    (job / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    told = sweep_summary.summarize_run(job)
    assert (told.tokens_per_second, told.mfu) == (200.0, 0.2)


def test_utilisation_is_in_every_table_and_fits(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a", ["kernels=auto"], "finished")
    write(job / "summary.json", SUMMARY | {"mfu": 0.4321, "tokens_per_second": 1654716.0})
    make_job(tmp_path / "b", ["kernels=triton"], "not started")
    file = io.StringIO()
    sweep_summary.tell(tmp_path, Console(file=file, width=80, highlight=False))
    for text in (file.getvalue(), (tmp_path / "sweep_summary.md").read_text()):
        assert "MFU" in text
        assert "43.2" in text
        assert "1,654,716" in text
        assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, file.getvalue().splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_has_everything(tmp_path: Path, width: int) -> None:
    file = io.StringIO()
    sweep_summary.tell(make_sweep(tmp_path), Console(file=file, width=width, highlight=False))
    text = file.getvalue()
    assert "sweep: 1 of 4 jobs finished" in text
    assert max(map(len, text.splitlines())) <= width
    for words in ("20,385", "5.12", "7.6377", "7.6398", "4.7", "tokens/s", "GiB", "rms_norm", "not started"):
        assert words in text, words
    assert "needs a CUDA GPU | sorry" in " ".join(text.split())
    assert "…" not in text


def test_the_files(tmp_path: Path) -> None:
    sweep_summary.tell(make_sweep(tmp_path), Console(file=io.StringIO()))
    stored = json.loads((tmp_path / "sweep_summary.json").read_text(), parse_constant=pytest.fail)
    assert [job["status"] for job in stored] == ["finished", "failed", "failed", "not started"]
    assert stored[0]["kernels"] == {"rms_norm": "triton"}
    rows = list(csv.DictReader((tmp_path / "sweep_summary.csv").open()))
    assert [row["val_loss"] for row in rows] == ["7.6398", "8.5", "8.5", ""]
    assert rows[2]["reason"] == "kernels=triton: needs a CUDA GPU | sorry"
    lines = (tmp_path / "sweep_summary.md").read_text().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines[:6]}) == 1
    assert "speed tokens/s" in lines[0]
    picture = (tmp_path / "sweep_summary.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_loss_that_is_no_number_stays_visible_and_is_valid_json(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a", ["seed=1"], "finished")
    write(job / "summary.json", SUMMARY | {"final/train_loss": float("nan")})
    file = io.StringIO()
    sweep_summary.tell(tmp_path, Console(file=file, width=100))
    assert "nan" in file.getvalue()
    assert (
        json.loads((tmp_path / "sweep_summary.json").read_text(), parse_constant=pytest.fail)[0]["train_loss"] is None
    )


@pytest.mark.parametrize("name", ["summary.json", "kernels.json", "env.json", "metrics.jsonl", ".hydra/overrides.yaml"])
def test_damaged_files_do_not_stop_it(tmp_path: Path, name: str) -> None:
    job = make_job(tmp_path / "a", ["seed=1"], "finished")
    (job / name).write_bytes(b"\xff[{:")
    (summary,) = sweep_summary.summarize_sweep(tmp_path)
    assert summary.status == "finished"


def test_a_run_folder_is_no_sweep(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path)
    assert sweep_summary.is_sweep(folder)
    assert not sweep_summary.is_sweep(folder / "a")
