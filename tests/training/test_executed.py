"""Chosen = executed: what a trace must show, and what it must not."""

from __future__ import annotations

import pytest

from llmmed.errors import UserError
from llmmed.training import executed
from llmmed.training.executed import NOT_CALLED, compare

OURS = ("add_rms_norm_triton_fwd_kernel", "add_rms_norm_triton_bwd_kernel")


def test_the_kernels_of_the_plan_are_seen() -> None:
    found = compare({"add_rms_norm": "triton"}, {"add_rms_norm"}, {*OURS, "ampere_bf16_s16816gemm"})
    assert found == {"add_rms_norm": f"seen: {', '.join(OURS)}"}


def test_a_name_inside_another_is_not_seen() -> None:
    choice = {"rms_norm": "triton", "add_rms_norm": "triton"}
    with pytest.raises(UserError, match=r"op 'rms_norm': the plan says triton, but .* launched none of"):
        compare(choice, set(choice), set(OURS))
    found = compare({"rms_norm": "pytorch"}, {"rms_norm"}, set(OURS))
    assert found == {"rms_norm": "no kernel of another implementation of ours was seen"}


def test_a_kernel_that_the_plan_does_not_name_is_an_error() -> None:
    with pytest.raises(UserError, match=r"op 'swiglu': the plan says pytorch, but .*swiglu_triton_fwd_kernel"):
        compare({"swiglu": "pytorch"}, {"swiglu"}, {"swiglu_triton_fwd_kernel"})


def test_a_backend_of_pytorch_is_known_by_part_of_its_name() -> None:
    launched = {"void pytorch_flash::flash_fwd_kernel<...>", "void pytorch_flash::flash_bwd_dq_dk_dv_loop<...>"}
    assert compare({"attention": "flash"}, {"attention"}, launched)["attention"] == "seen: flash_fwd, flash_bwd"
    compare({"attention": "pytorch"}, {"attention"}, launched)
    with pytest.raises(UserError, match=r"op 'attention': the plan says triton"):
        compare({"attention": "triton"}, {"attention"}, launched)


def test_what_two_implementations_launch_tells_them_not_apart() -> None:
    kernels = {"linear_cross_entropy_triton_fwd_kernel", "linear_cross_entropy_triton_bwd_kernel"}
    for name, other in (("triton", "triton_recompute"), ("triton_recompute", "triton")):
        said = compare({"linear_cross_entropy": name}, {"linear_cross_entropy"}, kernels)["linear_cross_entropy"]
        assert said.endswith(f"bwd_kernel, by which it cannot be told from {other}")


def test_what_launches_no_kernels_of_its_own_is_not_likened_to_another_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executed, "_others", lambda op, chosen: {"compiled": ()})
    assert compare({"rms_norm": "pytorch"}, {"rms_norm"}, set())["rms_norm"].endswith("of ours was seen")


def test_an_op_without_work_need_not_run() -> None:
    choice = {"cross_entropy": "triton", "linear_cross_entropy": "triton"}
    launched = {"linear_cross_entropy_triton_fwd_kernel"}
    found = compare(choice, {"linear_cross_entropy"}, launched)
    assert found["cross_entropy"] == NOT_CALLED
