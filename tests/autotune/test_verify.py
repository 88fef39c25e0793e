"""What the gate accepts and rejects, shown with candidates for `rms_norm` that misbehave, each in its own way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llmmed.autotune.failures import classify
from llmmed.autotune.judge import Truth, judge
from llmmed.autotune.plan import Status
from llmmed.autotune.trials import trials, within
from llmmed.autotune.verify import Verdict, _facts, _without_gradients, forget, poisoned_memory, verify
from llmmed.autotune.workload import record_workload
from llmmed.compose import compose
from llmmed.kernels.base import Call, Implementation, TensorSpec, Unavailable, tensor_spec
from llmmed.kernels.catalog import get_implementation, get_op, load_function, op_names

CPU = torch.device("cpu")
PLANTED = Implementation("candidate", load=lambda: None)  # type: ignore[arg-type,return-value]


def run_call(dtype: torch.dtype = torch.float32) -> Call:
    return Call.of(
        "rms_norm",
        x=tensor_spec(4, 16, 48, dtype=dtype, requires_grad=True),
        weight=tensor_spec(48, dtype=torch.float32, requires_grad=True),
        eps=1e-5,
    )


def judged(function: Callable[..., Any], call: Call | None = None, **options: Any) -> Verdict:
    implementation = Implementation("candidate", load=lambda: function)
    return verify(get_op("rms_norm"), implementation, function, [call or run_call()], CPU, **options)


def right(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float32, rounded once."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


class Overridden(torch.autograd.Function):
    """`right`, with gradients that a function of `(arriving, dx, dweight)` may spoil."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, spoil: Callable[..., Any]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.spoil = eps, spoil
        return right(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            y = right(x, weight, ctx.eps)
        gradients = torch.autograd.grad(y, (x, weight), dy)
        return (*ctx.spoil(dy, *gradients), None, None)


def with_backward(spoil: Callable[..., Any]) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result: Tensor = Overridden.apply(x, weight, eps, spoil)
        return result

    return function


def spoiled(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, eps: change(right(x, weight, eps))


def partly_written(tensor: Tensor) -> Tensor:
    out = torch.empty_like(tensor)
    out[..., :-1] = tensor[..., :-1]
    return out


def last_row_off(tensor: Tensor, by: float) -> Tensor:
    factor = torch.ones(tensor.shape[0], *[1] * (tensor.ndim - 1), dtype=tensor.dtype)
    factor[-1] += by
    return tensor * factor


def misplaced_epsilon(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


def no_epsilon(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return right(x, weight, 1e-30)


def changes_its_input(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = right(x, weight, eps)
    x.data.mul_(2)  # autograd does not notice
    return out


def changes_what_arrives(dy: Tensor, dx: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    dy.zero_()
    return dx, dweight


def off_if(condition: Callable[[Tensor], bool]) -> Callable[..., Any]:
    return lambda dy, dx, dweight: (dx * 1.02 if condition(dy) else dx, dweight)


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "2 % too large": (spoiled(lambda y: y * 1.02), "output 0: relative error 2.0e-02, allowed "),
    "epsilon misplaced": (misplaced_epsilon, "near_epsilon"),
    "epsilon absent": (no_epsilon, "near_epsilon"),
    "not everything written": (spoiled(partly_written), "not finite"),
    "a gradient not all written": (with_backward(lambda dy, dx, dw: (partly_written(dx), dw)), "gradient of x"),
    "another gradient not all written": (with_backward(lambda dy, dx, dw: (dx, partly_written(dw))), "of weight"),
    "infinite": (spoiled(lambda y: y / 0), "elements are not finite"),
    "a gradient of zero": (
        with_backward(lambda dy, dx, dw: (dx, dw * 0)),
        "gradient of weight: relative error 1.0e+00",
    ),
    "a gradient of the other sign": (with_backward(lambda dy, dx, dw: (-dx, dw)), "gradient of x"),
    "the last row": (spoiled(lambda y: last_row_off(y, 1e-4)), "output 0"),
    "the last row of a gradient": (with_backward(lambda dy, dx, dw: (last_row_off(dx, 1e-4), dw)), "gradient of x"),
    "only contiguous gradients": (with_backward(off_if(lambda dy: dy.is_contiguous())), "gradient of x"),
    "only transposed gradients": (with_backward(off_if(lambda dy: dy.stride(-1) != 1)), "gradient of x"),
    "only gradients of padded rows": (
        with_backward(off_if(lambda dy: dy.stride(-1) == 1 and not dy.is_contiguous())),
        "gradient of x",
    ),
    "only large gradients": (
        with_backward(off_if(lambda dy: bool(dy.abs().max() > 1000))),
        "gradients around 6.55e+04",
    ),
    "an input overwritten": (changes_its_input, "it changes its input x"),
    "an arriving gradient overwritten": (with_backward(changes_what_arrives), "it changes the gradient of output 0"),
    "another dtype": (spoiled(lambda y: y.double()), "output 0 is 1x64 float64 instead of 1x64 float32"),
    "another shape": (spoiled(lambda y: y[None]), "output 0 is 1x1x64 float32 instead of 1x64 float32"),
    "too many outputs": (lambda x, weight, eps: (right(x, weight, eps), x), "it returns 2 tensors instead of 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_rejected_with_the_reason(name: str) -> None:
    function, reason = WRONG[name]
    verdict = judged(function)
    assert verdict.status == "wrong", verdict
    assert reason in verdict.reason
    assert "\n" not in verdict.reason


def raising(error: BaseException) -> Callable[..., Any]:
    def function(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise error

    return function


OTHERS: dict[str, tuple[Callable[..., Any], Status, str]] = {
    "detached": (spoiled(torch.Tensor.detach), "no_backward", "its outputs do not require a gradient"),
    "one gradient missing": (
        lambda x, weight, eps: right(x, weight.detach(), eps),
        "no_backward",
        "no gradient reaches weight",
    ),
    "raises": (raising(ValueError("no such tile\nand more")), "crashed", "ValueError: no such tile"),
    "out of host memory": (raising(MemoryError()), "out_of_memory", "out of memory"),
    "out of memory": (raising(torch.cuda.OutOfMemoryError("tried 3 GiB")), "out_of_memory", "out of memory"),
    "no graph": (raising(torch._dynamo.exc.Unsupported("a break")), "failed_to_compile", "Unsupported: a break"),
    "unavailable after all": (raising(Unavailable("needs sm_90")), "unavailable", "needs sm_90"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_candidate_does_is_a_verdict(name: str) -> None:
    function, status, reason = OTHERS[name]
    verdict = judged(function)
    assert verdict.status == status
    assert verdict.reason.startswith(reason)
    assert verdict.relative_error is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_right_is_accepted(dtype: torch.dtype, seed: int) -> None:
    verdict = judged(right, call=run_call(dtype), seed=seed)
    assert verdict.status == "verified", verdict
    assert verdict.reason == ""
    assert verdict.checks > 100
    assert verdict.relative_error is not None
    assert 0 < verdict.relative_error < 2 * torch.finfo(dtype).eps
    assert verdict.worst_ratio is not None
    assert 0 < verdict.worst_ratio <= 1


@pytest.mark.parametrize("name", ["2 % too large", "epsilon misplaced", "the last row of a gradient"])
def test_wrong_in_16_bits_too(name: str) -> None:
    function, _ = WRONG[name]
    if name == "the last row of a gradient":
        function = with_backward(lambda dy, dx, dw: (last_row_off(dx, 0.03), dw))
    assert judged(function, call=run_call(torch.bfloat16)).status == "wrong"


def test_what_only_the_runs_own_call_shows_is_seen() -> None:
    def wrong_there(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return right(x, weight, eps) * (1.02 if x.shape == (4, 16, 48) else 1)

    verdict = judged(wrong_there)
    assert verdict.status == "wrong"
    assert "the run's x 4x16x48 float32" in verdict.reason


def test_two_runs_may_differ_unless_determinism_is_asked_for() -> None:
    runs = 0

    def flickering(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        nonlocal runs
        runs += 1
        return right(x, weight, eps) * (1 + runs % 2 * 2e-7)

    assert judged(flickering).status == "verified"
    verdict = judged(flickering, deterministic=True)
    assert verdict.status == "wrong"
    assert "differs between two runs" in verdict.reason
    assert judged(right, deterministic=True).status == "verified"


def test_a_candidate_that_overwrites_does_not_spoil_what_the_others_are_held_against() -> None:
    forget()
    assert judged(changes_its_input).status == "wrong"
    assert judged(right).status == "verified"


def test_global_settings_are_as_they_were() -> None:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    seen = []

    def watching(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return right(x, weight, eps)

    try:
        judged(watching)
        judged(raising(ValueError("no")))
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_float32_matmul_precision(precision)


def test_the_truth_is_found_once_for_all_candidates() -> None:
    calls = 0
    op = get_op("rms_norm")

    def counted(x: Tensor, weight: Tensor, eps: float) -> Any:
        nonlocal calls
        calls += 1
        return op.reference(x, weight, eps)

    counting = replace(op, reference=counted)
    for name in ("first", "second"):
        verdict = verify(counting, Implementation(name, load=lambda: right), right, [run_call()], CPU)
        assert verdict.status == "verified"
    assert calls == len(list(trials(counting, [run_call()], None, CPU)))


def test_a_large_call_is_tried_with_fewer_rows() -> None:
    huge = Call.of(
        "rms_norm",
        x=tensor_spec(2**20, 1024, dtype=torch.float32, requires_grad=True),
        weight=tensor_spec(1024, dtype=torch.float32, requires_grad=True),
        eps=1e-5,
    )
    (first, _) = (trial.call for trial in trials(get_op("rms_norm"), [huge], None, CPU) if trial.own)
    assert first.spec("x").shape == (2**13, 1024)
    assert first.spec("weight") == huge.spec("weight")


def test_only_rows_are_fewer_whatever_else_has_as_many() -> None:
    """As many sequences as positions, units and heads' numbers, and as many tokens as words."""
    config = compose(["model=tiny", "data=synthetic", "device=cpu", "train.precision=fp32", "optimizer=muon",
                      "train.micro_batch_size=64", "train.seq_len=64", "model.vocab_size=4096", "model.d_ff=64",
                      "train.global_batch_tokens=4096"])  # fmt: skip
    calls = record_workload(config).calls
    assert {call.op for call in calls} == set(op_names())
    for call in calls:
        op = get_op(call.op)
        smaller = within(op, call, 2**14)
        changed = {name for (name, old), (_, new) in zip(call.arguments, smaller.arguments, strict=True) if old != new}
        assert changed == {name for name in op.rows if isinstance(call[name], TensorSpec)}, call.describe()
        inputs = op.make_inputs(smaller, op.regimes[0], torch.Generator().manual_seed(0), CPU)
        load_function(op.name, get_implementation(op.name, "pytorch"))(**inputs)


def test_every_upstream_size_and_layout_is_tried_in_every_op() -> None:
    for op in map(get_op, ("rms_norm", "rotary", "attention")):
        found = {(trial.upstream, trial.layout) for trial in trials(op, [], None, CPU)}
        assert len(found) == 9


@pytest.mark.parametrize("op", ["rms_norm", "rotary", "attention", "newton_schulz", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_is_accepted(op: str, dtype: torch.dtype) -> None:
    implementation = get_implementation(op, "pytorch")
    function = load_function(op, implementation)
    verdict = verify(get_op(op), implementation, function, [], CPU, dtype=dtype)
    assert verdict.status == "verified", verdict


def truth_of(value: Tensor, default: Tensor) -> Truth:
    return Truth(value.double(), default, conditioning=1.0, masks={})


def test_a_loose_default_excuses_little_in_16_bits() -> None:
    value = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    truth = truth_of(value, (value * 1.3).bfloat16())
    worst, error = judge("output 0", truth, (value * 1.2).bfloat16(), torch.bfloat16)
    assert worst.ratio > 1
    assert error == pytest.approx(0.2, rel=0.01)
    assert judge("output 0", truth, (value * 1.02).bfloat16(), torch.bfloat16)[0].ratio < 1


def test_more_is_allowed_where_everything_cancels_but_not_in_16_bits() -> None:
    value = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for dtype, passes in ((torch.float32, True), (torch.bfloat16, False)):
        eps = torch.finfo(dtype).eps
        default, found = (value * (1 + 2 * eps)).to(dtype), (value * (1 + 3 * 2 * eps)).to(dtype)
        assert (judge("q", truth_of(value, default), found, dtype)[0].ratio < 1) == passes
    default, found = value * (1 + 1e-5), value * (1 + 1e-4)  # 84 eps and 840
    for conditioning, passes in ((84.0, True), (1.0, False)):
        truth = Truth(value.double(), default, conditioning, masks={})
        assert (judge("q", truth, found, torch.float32)[0].ratio < 1) == passes


def test_an_error_in_a_corner_does_not_drown_in_the_whole() -> None:
    value = torch.randn(800, 40, generator=torch.Generator().manual_seed(0))
    corner = value.clone()
    corner[-1] *= 1 + 3e-5
    whole = (corner - value).norm() / value.norm()
    assert whole < 16 * torch.finfo(torch.float32).eps
    worst, _ = judge("output 0", truth_of(value, value), corner, torch.float32)
    assert worst.ratio > 1


def test_what_an_evaluation_computes_is_held_against_the_truth_as_well() -> None:
    def wrong_without_gradients(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return right(x, weight, eps) * (1.0 if torch.is_grad_enabled() else 1.01)

    verdict = judged(wrong_without_gradients)
    assert verdict.status == "wrong"
    assert verdict.reason.startswith("output 0 without gradients: relative error 1.0e-02")

    def rounds_otherwise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return right(x, weight, eps) if torch.is_grad_enabled() else right(x.double(), weight.double(), eps).to(x.dtype)

    assert judged(rounds_otherwise).status == "verified"


@pytest.mark.parametrize("asked", [True, False])
def test_memory_is_poisoned_without_loosening_what_determinism_is_asked_for(asked: bool) -> None:
    torch.use_deterministic_algorithms(asked)
    try:
        with poisoned_memory():
            assert torch.empty(8).isnan().all()
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled() != asked
        assert torch.are_deterministic_algorithms_enabled() == asked
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_result_that_the_next_call_overwrites_is_wrong() -> None:
    buffers: dict[Any, Tensor] = {}

    def kept(y: Tensor) -> Tensor:
        return buffers.setdefault((y.shape, y.dtype), torch.empty_like(y)).detach().copy_(y)

    newton_schulz = load_function("newton_schulz", get_implementation("newton_schulz", "pytorch"))
    without_gradients = partial(verify, get_op("newton_schulz"), dtype=torch.float32)
    reason = "output 0 lies where that of an earlier call lies, which it overwrites"
    for verdict in (
        judged(lambda x, weight, eps: kept(right(x, weight, eps))),
        without_gradients(PLANTED, lambda G: kept(newton_schulz(G)), [], CPU),
    ):
        assert (verdict.status, verdict.reason) == ("wrong", reason)


def test_a_result_may_be_the_input_itself() -> None:
    plain = replace(get_op("rms_norm"), reference=lambda x, weight, eps: x + 0 * weight)
    facts = _facts(plain, 0, CPU, next(trials(plain, [], torch.float32, CPU)))
    assert facts is not None
    found = _without_gradients(lambda x, weight, eps: x, facts, {"output0": facts.inputs["x"]})
    assert found == {}


def test_what_is_compiled_for_each_shape_is_not_compiled_again_without_gradients() -> None:
    seen: set[bool] = set()

    def noted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        seen.add(torch.is_grad_enabled())
        return right(x, weight, eps)

    assert verify(get_op("rms_norm"), replace(PLANTED, per_shape=True), noted, [run_call()], CPU).status == "verified"
    assert seen == {True}
    assert verify(get_op("rms_norm"), PLANTED, noted, [run_call()], CPU).status == "verified"
    assert seen == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_where_the_truth_is_zero_the_defaults_error_is_all_that_is_allowed(dtype: torch.dtype) -> None:
    zero, noise = torch.zeros(4, 8), torch.full((4, 8), 1e-7)
    ill = Truth(zero.double(), noise.to(dtype), math.inf, masks={})
    assert judge("gradient of x", ill, zero.to(dtype), dtype)[0].ratio == 0
    assert judge("gradient of x", ill, noise.to(dtype), dtype)[0].ratio <= 1
    assert judge("gradient of x", ill, 100 * noise.to(dtype), dtype)[0].ratio > 1
    worst, _ = judge("gradient of x", ill, (zero + 1e4).to(dtype), dtype)
    assert worst.ratio > 1


def test_a_bound_that_is_no_number_lets_nothing_pass() -> None:
    right = torch.ones(4, 8, dtype=torch.bfloat16)
    worst, _ = judge("output", Truth(right.double(), right, math.nan, masks={}), 2 * right, torch.bfloat16)
    assert worst.ratio == math.inf


def test_where_the_truth_is_zero_nothing_else_is_right() -> None:
    zero = torch.zeros(4, 8)
    assert judge("gradient of x", truth_of(zero, zero), zero, torch.float32)[0].ratio == 0
    worst, _ = judge("gradient of x", truth_of(zero, zero), zero + 1e-9, torch.float32)
    assert worst.ratio > 1
    assert "gradient of x: error 5.7e-09, allowed 0.0e+00" in worst.message


def test_nothing_is_asked_of_no_elements() -> None:
    nothing = torch.zeros(0, 8)
    assert judge("output 0", truth_of(nothing, nothing), nothing, torch.float32)[0].ratio == 0


def test_an_error_of_triton_is_a_failed_compilation() -> None:
    triton = pytest.importorskip("triton")
    assert classify(triton.OutOfResources(300, 200, "shared memory"))[0] == "failed_to_compile"
    assert classify(RuntimeError("something else"))[0] == "crashed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_default_that_is_wrong_by_itself_is_rejected(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is measured by the default, and it is measured by the truth."""

    def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return right(x, weight, eps) * 1.02

    planted = replace(get_implementation("rms_norm", "pytorch"), load=lambda: wrong)
    monkeypatch.setattr("llmmed.autotune.verify.get_implementation", lambda op, name: planted)
    forget()
    verdict = verify(get_op("rms_norm"), planted, wrong, [run_call(dtype)], CPU)
    forget()
    assert verdict.status == "wrong"
    assert "even for a default" in verdict.reason


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [(MemoryError(), "out_of_memory", "out of memory"), (ValueError("no"), "crashed", "ValueError: no")],
)
@pytest.mark.parametrize("which", ["reference", "default"])
def test_what_a_candidate_is_held_against_may_raise_without_blaming_it(
    which: str, error: Exception, status: Status, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise error

    op = get_op("rms_norm")
    if which == "reference":
        op = replace(op, reference=raises)
    else:
        monkeypatch.setattr("llmmed.autotune.verify.load_function", lambda op, implementation: raises)
    implementation = Implementation("candidate", load=lambda: right)
    try:
        for _ in range(2):  # and so the next is told the same
            verdict = verify(op, implementation, right, [run_call()], CPU)
            assert (verdict.status, verdict.reason) == (status, f"the {which} cannot be evaluated here: {told}")
    finally:
        forget()
