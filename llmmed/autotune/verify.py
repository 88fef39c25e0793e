"""The gate: a candidate's outputs and every gradient against float64, over values as well as shapes.

A trial is a call, a distribution of values and the size of the gradients that arrive. Candidates are tried at the op's
small cases in the run's dtype and in float32, and at the run's own calls. `judge` says how much error is allowed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmmed.autotune.failures import classify
from llmmed.autotune.judge import Finding, Truth, judge, judge_default, relative
from llmmed.autotune.plan import Status
from llmmed.autotune.trials import Layout, Trial, trials
from llmmed.kernels.base import Call, Implementation, Inputs, Op
from llmmed.kernels.catalog import DEFAULT, get_implementation, load_function

_EVALUATED = " without gradients"  # of a result: computed where none are asked for, as in an evaluation


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    `relative_error` is the largest at the run's own calls, or of all if there are none; `worst_ratio` the largest of an
    error to its bound.
    """

    status: Status
    reason: str
    relative_error: float | None
    worst_ratio: float | None
    checks: int


class _Rejected(Exception):
    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def verify(
    op: Op,
    implementation: Implementation,
    function: Callable[..., Any],
    calls: Iterable[Call],
    device: torch.device,
    *,
    seed: int = 0,
    deterministic: bool = False,
    dtype: torch.dtype | None = None,
    cases: Collection[str] | None = None,
    to_the_end: bool = False,
    whose: str = "the run's",
) -> Verdict:
    """Judges a candidate. Never raises for what the candidate does.

    Args:
        op: The op.
        implementation: Its description.
        function: What `catalog.load_function` gave.
        calls: The run's own calls of the op.
        device: Where.
        seed: Of the values.
        deterministic: Whether two runs on the same inputs must give the same bits.
        dtype: The compute dtype, where there are no calls to tell it.
        cases: The op's cases to try, by name; None for all.
        to_the_end: Whether to go on after a wrong result, to find the worst.
        whose: Whose calls they are, for people.
    """
    worst = Finding(0.0, "")
    own = list(calls)
    relative_error = 0.0
    checks = 0
    few_shapes = implementation.per_shape
    try:
        with exact_products():
            for trial in trials(op, own, dtype, device, few_shapes=few_shapes, cases=cases, whose=whose):
                if trial.call.compute_dtype not in implementation.dtypes:
                    continue
                facts = _remembered(op, seed, device)(trial)
                if facts is None:
                    continue
                results = _run_candidate(
                    function, facts, device, poison=trial.poison, twice=deterministic, evaluated=not few_shapes
                )
                for name, found in results.items():
                    truth = facts.results[name.removesuffix(_EVALUATED)]
                    finding, error = judge(_words(name), truth, found, trial.call.compute_dtype)
                    if implementation.name == DEFAULT:
                        finding = max(finding, judge_default(_words(name), error, trial.call.compute_dtype), key=_ratio)
                    checks += 1
                    counts = trial.own or (not own and dtype in (None, trial.call.compute_dtype))
                    if counts or finding.ratio > 1:
                        relative_error = max(relative_error, error)
                    if finding.ratio > worst.ratio:
                        worst = Finding(finding.ratio, f"{finding.message} ({trial.label})")
                    if worst.ratio > 1 and not to_the_end:
                        return Verdict("wrong", worst.message, relative_error, worst.ratio, checks)
    except _Rejected as rejection:
        forget()  # it may have left something else in what the others share
        return Verdict(rejection.status, str(rejection), None, None, checks)
    if not checks:
        return Verdict("wrong", "nothing can be compared: even PyTorch's results are not finite", None, None, 0)
    if worst.ratio > 1:
        return Verdict("wrong", worst.message, relative_error, worst.ratio, checks)
    return Verdict("verified", "", relative_error, worst.ratio, checks)


def _ratio(finding: Finding) -> float:
    return finding.ratio


def forget() -> None:
    """Frees what was kept for further candidates of the same op, which on a GPU is memory that the clock needs."""
    _remembered.cache_clear()


@dataclass(frozen=True)
class _Facts:
    """The inputs of a trial, the gradients that arrive, and what each result is held against."""

    inputs: Inputs
    leaves: tuple[str, ...]
    upstream: tuple[Tensor, ...]
    results: dict[str, Truth]


@functools.lru_cache(maxsize=1)
def _remembered(op: Op, seed: int, device: torch.device) -> Callable[[Trial], _Facts | None]:
    """Draws each trial of an op once for all its candidates, and forgets them with the next op."""
    return functools.cache(functools.partial(_facts, op, seed, device))


def _facts(op: Op, seed: int, device: torch.device, trial: Trial) -> _Facts | None:
    """None if not even the default has a finite answer."""
    generator = torch.Generator(device=device).manual_seed(seed)
    with _trusted("reference"):
        inputs = op.make_inputs(trial.call, trial.regime, generator, device)
    tensors = trial.call.tensors.items()
    leaves = tuple(name for name, spec in tensors if spec.requires_grad and name in op.differentiable)
    with _trusted("default"):
        default = load_function(op.name, get_implementation(op.name, DEFAULT))
        shown = _outputs(default(**inputs))
    directions = []
    for output in shown:
        drawn = (
            torch.randn(output.shape, generator=generator, device=device) if output.ndim else torch.ones_like(output)
        )
        directions.append((drawn, output.dtype))
    size = trial.upstream
    for _ in range(8):
        upstream = [arriving(drawn * size, dtype, trial.layout) for drawn, dtype in directions]
        with _trusted("reference"):
            expected = _evaluate(op.reference, _cast(inputs, torch.float64), leaves, [u.double() for u in upstream])
        with _trusted("default"):
            found = _evaluate(default, inputs, leaves, upstream)
        if all(_fits(expected[name], found[name]) for name in found):
            single = found
            if trial.call.compute_dtype != torch.float32:
                with _trusted("default"):
                    single = _evaluate(default, _cast(inputs, torch.float32), leaves, [u.float() for u in upstream])
            return _Facts(inputs, leaves, tuple(upstream), _truths(op, inputs, expected, found, single))
        if not leaves:
            return None
        size /= 64
    return None


@contextlib.contextmanager
def _trusted(which: str) -> Iterator[None]:
    """Around what candidates are held against: where it raises, that is no doing of the one that is being judged."""
    try:
        yield
    except Exception as error:
        status, reason = classify(error)
        raise _Rejected(status, f"the {which} cannot be evaluated here: {reason}") from error


def _truths(
    op: Op, inputs: Inputs, expected: dict[str, Tensor], found: dict[str, Tensor], single: dict[str, Tensor]
) -> dict[str, Truth]:
    one_row = any(v.ndim > 1 and v.numel() == v.shape[-1] for v in inputs.values() if isinstance(v, Tensor))
    truths = {}
    for name, value in expected.items():
        conditioning = relative(single[name].double() - value, value) / torch.finfo(torch.float32).eps
        masks = op.parts(inputs, name, value) if op.parts is not None else {}
        truths[name] = Truth(value, found[name], conditioning, masks, one_row)
    return truths


def _fits(expected: Tensor, found: Tensor) -> bool:
    """Whether a result can be represented at all, with room for a candidate's own order of summing."""
    if not expected.numel():
        return True
    return bool(expected.abs().max() < torch.finfo(found.dtype).max / 4) and bool(found.isfinite().all())


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}


def arriving(values: Tensor, dtype: torch.dtype, layout: Layout) -> Tensor:
    """Gradients as a step may hand them over, in the result's dtype."""
    values = values.to(dtype)
    if layout == "contiguous" or values.ndim < 2:
        return values
    if layout == "transposed":
        return values.mT.contiguous().mT
    return torch.nn.functional.pad(values, (0, 8), value=math.nan)[..., :-8]


def _evaluate(
    function: Callable[..., Any], inputs: Inputs, leaves: tuple[str, ...], upstream: list[Tensor]
) -> dict[str, Tensor]:
    """Outputs `output0`, ... and gradients `grad_<argument>`."""
    arguments = {n: v.detach().requires_grad_() if n in leaves else v for n, v in inputs.items()}
    outputs = _outputs(function(**arguments))
    results = {f"output{i}": output.detach() for i, output in enumerate(outputs)}
    if leaves:
        gradients = torch.autograd.grad(outputs, [arguments[n] for n in leaves], upstream)
        results |= {f"grad_{n}": gradient for n, gradient in zip(leaves, gradients, strict=True)}
    return results


def _run_candidate(
    function: Callable[..., Any], facts: _Facts, device: torch.device, *, poison: bool, twice: bool, evaluated: bool
) -> dict[str, Tensor]:
    """Outputs and gradients, and where `evaluated` also the outputs that differ where no gradients are asked for."""
    given = {f"its input {n}": v for n, v in facts.inputs.items() if isinstance(v, Tensor)}
    given |= {f"the gradient of output {i} that arrives": v for i, v in enumerate(facts.upstream)}
    before = {name: value.clone() for name, value in given.items()}
    try:
        with poisoned_memory() if poison else contextlib.nullcontext():
            results = _evaluate_candidate(function, facts)
            again = _evaluate_candidate(function, facts) if twice else results
            different = _without_gradients(function, facts, results) if evaluated else {}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except _Rejected:
        raise
    except Exception as error:  # whatever a candidate raises rejects that candidate alone
        raise _Rejected(*classify(error)) from error
    for name, value in before.items():
        if not torch.equal(value, given[name]):
            raise _Rejected("wrong", f"it changes {name}")
    for name, found in results.items():
        if not torch.equal(found, again[name]) and bool(found.isfinite().all()):
            raise _Rejected("wrong", f"{_words(name)} differs between two runs, and train.deterministic=true")
    return results | different


def _without_gradients(function: Callable[..., Any], facts: _Facts, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs as an evaluation computes them, those alone that differ from what is known."""
    inputs = {v.untyped_storage().data_ptr() for v in facts.inputs.values() if isinstance(v, Tensor)}
    with torch.no_grad():
        outputs = _outputs(function(**facts.inputs))
    found = {f"output{i}": output for i, output in enumerate(outputs)}
    _check_kinds(found, facts)
    for name, output in found.items():
        place = output.untyped_storage().data_ptr()
        if place and place == results[name].untyped_storage().data_ptr() and place not in inputs:
            raise _Rejected("wrong", f"{_words(name)} lies where that of an earlier call lies, which it overwrites")
    return {f"{name}{_EVALUATED}": output for name, output in found.items() if not torch.equal(output, results[name])}


def _evaluate_candidate(function: Callable[..., Any], facts: _Facts) -> dict[str, Tensor]:
    arguments = {n: v.detach().requires_grad_() if n in facts.leaves else v for n, v in facts.inputs.items()}
    outputs = _outputs(function(**arguments))
    if len(outputs) != len(facts.upstream):
        raise _Rejected("wrong", f"it returns {len(outputs)} tensors instead of {len(facts.upstream)}")
    results = {f"output{i}": output.detach() for i, output in enumerate(outputs)}
    if facts.leaves:
        flowing = [(o, u) for o, u in zip(outputs, facts.upstream, strict=True) if o.requires_grad]
        if not flowing:
            raise _Rejected("no_backward", "its outputs do not require a gradient where its inputs do")
        _check_kinds(results, facts)
        given = [arguments[n] for n in facts.leaves]
        found = torch.autograd.grad([o for o, _ in flowing], given, [u for _, u in flowing], allow_unused=True)
        for name, gradient in zip(facts.leaves, found, strict=True):
            if gradient is None:
                raise _Rejected("no_backward", f"no gradient reaches {name}")
            results[f"grad_{name}"] = gradient
    _check_kinds(results, facts)
    return results


def _check_kinds(results: dict[str, Tensor], facts: _Facts) -> None:
    for name, found in results.items():
        wanted = facts.results[name].default
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise _Rejected("wrong", f"{_words(name)} is {_kind(found)} instead of {_kind(wanted)}")


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _words(name: str) -> str:
    return (
        f"gradient of {name.removeprefix('grad_')}" if name.startswith("grad_") else name.replace("output", "output ")
    )


def _kind(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'a scalar'} {str(tensor.dtype).removeprefix('torch.')}"


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products without TF32, on both sides of every comparison."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated without values holds NaN, so that what a kernel fails to write shows."""
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        yield  # it does already, and a mere warning would have FlashAttention sum in any order
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PyTorch fills such memory while it is asked for determinism; `fill_uninitialized_memory` is on by default.
        # Not by `use_deterministic_algorithms`, which also tells the compiler, and imports it for that: a second.
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
