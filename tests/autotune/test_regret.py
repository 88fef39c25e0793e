"""Regret, with an arena whose times are known."""

from __future__ import annotations

import pytest

from llmmed.autotune.hardware import describe_hardware
from llmmed.autotune.plan import Candidate, KernelPlan, OpPlan
from llmmed.autotune.regret import Neighbour, measure_regret, neighbours
from tests.autotune.test_confirm import Known


def plan(**chosen: str) -> KernelPlan:
    verified, wrong = Candidate(status="verified", total_ms=1.0), Candidate(status="wrong", reason="wrong: 2 %")
    ops = {
        op: OpPlan(
            chosen=chosen.get(op, "pytorch"), reason="", calls=[], source_sha256="",
            candidates={"pytorch": verified, "triton": verified, "liger": wrong},
        )
        for op in ("add_rms_norm", "rotary", "swiglu")
    }  # fmt: skip
    return KernelPlan(
        policy="auto", mode="graphs", ops=ops, hardware=describe_hardware("cpu"), workload_fingerprint="x",
        cached=False, tuning_seconds=1.0,
    )  # fmt: skip


def test_neighbours_are_verified_and_at_most_two_flips_away() -> None:
    assert len(neighbours(plan(), pairs=False)) == 1 + 3
    found = neighbours(plan(), pairs=True)
    assert len(found) == 1 + 3 + 3
    assert {"rotary": "triton", "swiglu": "triton"} in found
    assert not any("liger" in flips.values() for flips in found)


def test_the_best_neighbour_is_found() -> None:
    together = (("rotary", "triton"), ("swiglu", "triton"))
    arena = Known({(("rotary", "triton"),): -0.5, (("swiglu", "triton"),): +0.2, together: -1.7})
    chosen, told = plan(rotary="triton"), list[Neighbour]()
    regret = measure_regret(arena, chosen, neighbours(chosen, pairs=True), told=told.append, time_is_up=lambda: False)
    assert regret.chosen_ms == pytest.approx(9.5)
    assert max(told, key=lambda n: n.gain_ms or 0.0).flips == dict(together)
    assert regret.share == pytest.approx((1.5 - arena.noise) / 9.5)
    assert regret.left_out == 0
    assert regret.to_json()["share"] == regret.share


def test_noise_is_no_regret_and_time_ends_it() -> None:
    arena = Known({(("rotary", "triton"),): -0.005})
    regret = measure_regret(
        arena, plan(), neighbours(plan(), pairs=False), told=lambda n: None, time_is_up=lambda: False
    )
    assert regret.share <= 0
    answers = iter([False, True])
    cut = measure_regret(
        arena, plan(), neighbours(plan(), pairs=False), told=lambda n: None, time_is_up=lambda: next(answers)
    )
    assert (len(cut.neighbours), cut.left_out) == (1, 3)
