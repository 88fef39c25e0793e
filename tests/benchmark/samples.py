"""What the tests of the benchmarks share: a tiny one that runs, and results as a GPU gives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from llmmed.autotune.plan import Ceilings, Hardware
from llmmed.benchmark.cli import run
from llmmed.benchmark.contestants import CONTESTANTS
from llmmed.benchmark.results import OpRow, OpsResult, Origin, Result, StepResult, StepRow, StepShape
from llmmed.benchmark.settings import as_lists, compose_benchmark
from llmmed.reporting.benchmark_plots import GROUPS

TINY = ["device=cpu", "model=tiny", "tokenizer.vocab_size=300", "train.seq_len=16", "train.micro_batch_size=2"]


STEP = ["benchmark=step", "rounds=1", "blocks=3", "block_steps=1", "warm_up_steps=1", "warm_up_seconds=0"]


def benchmark(folder: Path, *overrides: str) -> tuple[Result, str]:
    written = as_lists(overrides)
    settings, config = compose_benchmark(written)
    console = Console(width=140, record=True)
    return run(settings, config, written, folder, console), console.export_text()


def origin() -> Origin:
    hardware = Hardware(device="A GPU", driver="1.0", cuda="13.0", torch="2.11", triton="3.6", python="3.11",
                        cpu="A CPU", cpu_threads=1)  # fmt: skip
    return Origin(date="2000-01-01T00:00:00+00:00", command="python scripts/benchmark.py", commit="abc",
                  changed_files=0, hardware=hardware, packages={"liger-kernel": None}, config={})  # fmt: skip


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
