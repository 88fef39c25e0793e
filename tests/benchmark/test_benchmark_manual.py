"""The functions for a Python prompt, and the page for those who come from the script."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmmed
from llmmed import compose
from llmmed.autotune.measure import Measurement
from llmmed.benchmark import manual
from llmmed.benchmark.settings import compose_benchmark
from llmmed.errors import UserError
from llmmed.kernels import catalog

PAGE = (Path(__file__).parent.parent.parent / "docs" / "coming-from-the-script.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("size", [0, -1, 2.0, "2"])
def test_sizes_are_whole_numbers(size: int) -> None:
    with pytest.raises(ValueError, match="sizes are whole numbers from 1 up"):
        llmmed.benchmark_rms_norm(batch_size=size)


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
