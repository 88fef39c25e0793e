"""Regret, with an arena whose times are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from llmmed.autotune.confirm import Choice
from llmmed.autotune.hardware import describe_hardware
from llmmed.autotune.plan import Candidate, KernelPlan, OpPlan
from llmmed.autotune.regret import Regret, choice_of, measure_regret, measured_before, neighbours
from llmmed.errors import UserError
from llmmed.files import write_json
from tests.autotune.test_confirm import Known
from tests.processes import run_script


def plan(ops: tuple[str, ...] = ("add_rms_norm", "rotary", "swiglu"), **chosen: str) -> KernelPlan:
    verified, wrong = Candidate(status="verified", total_ms=1.0), Candidate(status="wrong", reason="wrong: 2 %")
    plans = {
        op: OpPlan(
            chosen=chosen.get(op, "pytorch"), reason="", calls=[], source_sha256="",
            candidates={"pytorch": verified, "triton": verified, "liger": wrong},
        )
        for op in ops
    }  # fmt: skip
    return KernelPlan(
        policy="auto", mode="graphs", ops=plans, hardware=describe_hardware("cpu"), workload_fingerprint="x",
        cached=False, tuning_seconds=1.0,
    )  # fmt: skip


def test_neighbours_are_verified_and_a_flip_from_the_chosen_or_two_from_the_default() -> None:
    chosen = plan(rotary="triton", swiglu="triton")
    near = ["the chosen, but add_rms_norm triton", "the chosen, but rotary pytorch", "the chosen, but swiglu pytorch"]
    names = [each.name for each in neighbours(chosen, pairs=False)]
    # What is one flip from both comes once: swiglu triton is the chosen without rotary.
    assert names == [*near, "PyTorch's plan", "add_rms_norm triton"]
    names = [each.name for each in neighbours(chosen, pairs=True)]
    assert names[5:] == ["add_rms_norm triton, rotary triton", "add_rms_norm triton, swiglu triton"]
    found = neighbours(chosen, pairs=True)
    choices = [choice_of(each, chosen) for each in found]
    assert chosen.choice not in choices
    assert all(choices.count(each) == 1 for each in choices)
    assert not any("liger" in each.flips.values() for each in found)
    assert choices[0] == {"add_rms_norm": "triton", "rotary": "triton", "swiglu": "triton"}


def test_a_fused_op_that_was_chosen_is_held_against_its_parts() -> None:
    found = neighbours(plan(("rotary", "swiglu", "swiglu_mlp"), swiglu_mlp="triton"), pairs=False)
    names = [each.name for each in found]
    assert "the chosen, but swiglu_mlp pytorch, swiglu triton" in names
    assert not any("swiglu_mlp pytorch, rotary" in name for name in names)
    assert all(len(each.flips) <= 1 for each in neighbours(plan(("swiglu", "swiglu_mlp")), pairs=False))


def test_what_flips_an_op_that_is_not_called_is_passed_over() -> None:
    class Blind(Known):
        def called(self, choice: Mapping[str, str]) -> set[str]:
            return {"rotary", "swiglu"} if choice["rotary"] == "triton" else {"rotary", "swiglu", "add_rms_norm"}

    told: list[Regret] = []
    chosen = plan(rotary="triton")
    regret = measure_regret(
        Blind({}), chosen, neighbours(chosen, pairs=False), told=told.append, time_is_up=lambda: False
    )
    names = [each.neighbours[-1].name for each in told]
    assert names == ["the chosen, but rotary pytorch", "the chosen, but swiglu triton",
                     "add_rms_norm triton", "swiglu triton"]  # fmt: skip
    assert regret.left_out == 0


def test_the_best_neighbour_is_found() -> None:
    together = (("rotary", "triton"), ("swiglu", "triton"))
    arena = Known({(("rotary", "triton"),): -0.5, (("swiglu", "triton"),): +0.2, together: -1.7})
    chosen, heard = plan(rotary="triton"), list[Regret]()
    waited_for: list[Choice] = []
    regret = measure_regret(
        arena, chosen, neighbours(chosen, pairs=True), told=heard.append, time_is_up=lambda: False,
        ready=waited_for.append,
    )  # fmt: skip
    told = [each.neighbours[-1] for each in heard]
    assert [each.left_out for each in heard] == list(range(len(told)))[::-1]
    assert regret.neighbours == told
    assert waited_for == [dict.fromkeys(chosen.ops, "pytorch"), chosen.choice, *(choice_of(n, chosen) for n in told)]
    assert regret.chosen_ms == pytest.approx(9.5)
    best = max(told, key=lambda n: n.gain_ms or 0.0)
    assert choice_of(best, chosen) == {"add_rms_norm": "pytorch", **dict(together)}
    assert regret.share == pytest.approx((1.5 - arena.noise) / 9.5)
    assert regret.left_out == 0
    assert regret.to_json()["share"] == regret.share
    assert arena.losses_enough == [False, *[True] * len(told)]  # what the chosen plan takes is wanted in full


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
    assert (len(cut.neighbours), cut.left_out) == (1, 2)  # the default is the chosen plan


def test_what_was_measured_before_is_gone_on_with() -> None:
    arena, chosen, answers = Known({}), plan(rotary="triton"), iter([False, False, True])
    near = neighbours(chosen, pairs=True)
    first = measure_regret(arena, chosen, near, told=lambda r: None, time_is_up=lambda: next(answers))
    assert (len(first.neighbours), first.left_out) == (2, len(near) - 2)
    tried = len(arena.losses_enough)
    rest = measure_regret(
        arena, chosen, near, told=lambda r: None, time_is_up=lambda: False, before=first.neighbours
    )  # fmt: skip
    assert rest.neighbours[:2] == first.neighbours
    assert [each.name for each in rest.neighbours] == [each.name for each in near]
    assert rest.left_out == 0
    assert len(arena.losses_enough) - tried == 1 + len(near) - 2  # the chosen plan, and what was left


def test_only_what_is_of_the_same_plan_is_gone_on_with(tmp_path: Path) -> None:
    path, about = tmp_path / "base.json", {"model": "base", "sources": {"rotary": "a"}}
    assert measured_before(path, about) == []
    chosen = plan(rotary="triton")
    regret = measure_regret(
        Known({}), chosen, neighbours(chosen, pairs=True), told=lambda r: None, time_is_up=lambda: False
    )
    write_json(path, regret.to_json() | about)
    assert measured_before(path, about) == regret.neighbours
    with pytest.raises(UserError, match=r"out=.*base.json: it is there, of other model, sources; name another file"):
        measured_before(path, {"model": "small", "sources": {"rotary": "b"}})
    for text in ("{", "[]", '{"neighbours": 1}', '{"neighbours": [{"name": 1}]}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"not what scripts/regret.py writes"):
            measured_before(path, about)


@pytest.mark.parametrize("argument", ["seconds=abc", "seconds=0", "seconds=inf", "pairs=yes"])
def test_an_argument_that_is_no_use_is_told(argument: str, tmp_path: Path, repository: Path) -> None:
    done = run_script(repository / "scripts" / "regret.py", ["model=tiny", argument], tmp_path)
    assert done.returncode == 1
    assert f"error: {argument}: " in done.stderr
