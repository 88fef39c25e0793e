"""The table of kernels: nothing essential is cut off at any width, and the choice is told in words."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmmed.autotune.plan import CallCount, Candidate, Hardware, KernelPlan, OpPlan, StepEvidence, StepTimes
from llmmed.reporting.kernel_table import print_kernel_table

DASH = "\N{EN DASH}"
WRONG = "gradient of weight: relative error 4.0e-01, allowed 2.1e-06 (case odd width, regime outliers)"


def make_plan(memory: float | None = 144.0, *, cached: bool = False) -> KernelPlan:
    norm = {
        "pytorch": Candidate(
            status="verified",
            reason="slower than triton (0.33x)",
            relative_error=1.7e-3,
            total_ms=1234.5,
            peak_memory_mib=memory,
            speedup=1.0,
        ),
        "liger": Candidate(status="wrong", reason=f"wrong: {WRONG}", relative_error=0.4),
        "triton": Candidate(
            status="verified",
            reason="fastest: 3x pytorch",
            relative_error=1.6e-3,
            total_ms=0.0412,
            peak_memory_mib=memory,
            speedup=3.0,
        ),
    }
    rotary = {
        "pytorch": Candidate(status="not_tried", reason="in place of triton, which kernels=triton asks for"),
        "triton": Candidate(status="unavailable", reason="unavailable: needs a CUDA GPU"),
    }
    ops = {
        name: OpPlan(
            chosen=chosen,
            reason="",
            calls=[CallCount(op=name, arguments={}, count=count)],
            candidates=candidates,
            source_sha256="",
        )
        for name, chosen, count, candidates in (("rms_norm", "triton", 13, norm), ("rotary", "pytorch", 1, rotary))
    }
    hardware = Hardware(device="x", driver=None, cuda=None, torch="2", triton=None, python="3", cpu="x", cpu_threads=1)
    return KernelPlan(
        policy="auto",
        mode="eager",
        ops=ops,
        hardware=hardware,
        workload_fingerprint="",
        cached=cached,
        tuning_seconds=12.34,
    )


def printed(plan: KernelPlan, width: int, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    print_kernel_table(plan, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 140, 400])
def test_nothing_essential_is_cut_off(width: int) -> None:
    text = printed(make_plan(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for row in (
        ["rms_norm", "13", "calls"],
        ["pytorch", "verified", "1.7e-03", "1,234", "144", "1.00"],
        ["liger", "wrong", "4.0e-01", DASH, DASH, DASH],
        ["✓", "triton", "verified", "1.6e-03", "0.0412", "144", "3.00"],
        ["rotary", "1", "call"],
        ["✓", "pytorch", "not", "tried", DASH, DASH, DASH, DASH],
        ["triton", "unavailable", DASH, DASH, DASH, DASH],
    ):
        assert any(line.split()[: len(row)] == row for line in text.splitlines()), row
    for words in (WRONG, "needs a CUDA GPU", "fwd+bwd ms", "memory MiB"):
        assert all(word in text for word in words.split()), words


@pytest.mark.parametrize("width", [40, 60, 75])
def test_in_a_narrow_terminal_reasons_have_lines_of_their_own(width: int) -> None:
    text = printed(make_plan(), width)
    assert max(map(len, text.splitlines())) <= width
    lines = [line.strip() for line in text.splitlines()]
    assert {"rms_norm  13 calls", "pytorch  verified  1,234 ms  1.00x", "✓ triton  verified  0.0412 ms  3.00x"} <= {
        *lines
    }
    assert f"    {WRONG.split(',')[0][:30]}" in text
    assert " ".join(WRONG.split()) in " ".join(text.split())


def test_what_nobody_could_try_for_one_reason_is_one_row() -> None:
    plan = make_plan()
    norm, nowhere = plan.ops["rms_norm"], plan.ops["rotary"].candidates["triton"]
    more = norm.candidates | {"quack": nowhere, "apex": nowhere, "thunder": nowhere}
    text = printed(plan.model_copy(update={"ops": {"rms_norm": norm.model_copy(update={"candidates": more})}}), 140)
    assert text.count("needs a CUDA GPU") == 1
    assert "needs a CUDA GPU: quack, apex, thunder" in text
    assert any(line.split()[:3] == ["3", "others", "unavailable"] for line in text.splitlines())


def test_reasons_do_not_repeat_the_verdict() -> None:
    text = printed(make_plan(), 400)
    assert f"  {WRONG}" in text
    assert "  needs a CUDA GPU" in text


def test_a_log_file_gets_no_control_characters() -> None:
    assert "\x1b" not in printed(make_plan(), 100)
    assert "\x1b[1m" in printed(make_plan(), 100, terminal=True)


def test_a_column_without_values_is_left_out() -> None:
    assert "MiB" in printed(make_plan(), 100)
    assert "Memory: the most" in printed(make_plan(), 400)
    without = printed(make_plan(memory=None), 400)
    assert "MiB" not in without
    assert "Memory" not in without
    assert "each op by itself." in without


def test_the_choice_is_told_in_words() -> None:
    text = printed(make_plan(), 200)
    assert "Chosen: triton for rms_norm (3.00x); pytorch for rotary." in text
    assert "Found in 12.3 s, for eager mode." in text
    assert "From the tuning cache, for eager mode." in printed(make_plan(cached=True), 200)


def test_times_in_the_step_are_those_of_a_step() -> None:
    times = StepTimes(choice={"rms_norm": "pytorch"}, ms=12.0, ms_low=12.0, ms_high=12.0, peak_memory_gib=None)
    step = StepEvidence(
        trial_depth=2, depths=(1, 2), trials=[], default=times, reason="", mode="eager",
        chosen=times.model_copy(update={"choice": {"rms_norm": "triton"}, "ms": 10.0}),
    )  # fmt: skip
    better = make_plan().model_copy(update={"step": step})
    assert "In the step: 10.0 ms a step; 12.0 with PyTorch's" in printed(better, 200)
    assert "Found in 12.3 s, won back in 6,170 steps of this run and later ones, for eager mode." in printed(
        better, 300
    )
    assert "won back" not in printed(better.model_copy(update={"cached": True}), 300)
    same = make_plan().model_copy(update={"step": step.model_copy(update={"chosen": times})})
    assert "In the step: 12.0 ms a step." in printed(same, 200)
    assert "won back" not in printed(same, 300)


def test_a_stranger_is_told_what_the_columns_are() -> None:
    text = " ".join(printed(make_plan(), 80).split())
    assert "is used. Verdict and error: outputs and every gradient against float64." in text
    pytorch = {
        name: op.model_copy(update={"chosen": "pytorch", "candidates": {"pytorch": op.candidates["pytorch"]}})
        for name, op in make_plan().ops.items()
        if name == "rotary"
    }
    forced = printed(make_plan().model_copy(update={"ops": pytorch}), 80)
    assert "Chosen: pytorch for every op." in forced
    assert "kernels=triton asks for" not in forced  # a table that says nothing else is left out
    assert "nothing was left to measure" in forced
    assert "float64" not in forced
