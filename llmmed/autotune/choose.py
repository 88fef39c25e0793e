"""The choice: pure functions from what was proved and measured to one implementation an op, with a reason for each.

The default keeps its seat unless a verified rival beats it by more than the margin and by more than the noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmmed.autotune.plan import Candidate, StepEvidence, StepTrial
from llmmed.errors import UserError
from llmmed.kernels.catalog import DEFAULT


@dataclass(frozen=True)
class Decision:
    """The implementation chosen for an op, why, and every candidate with its own reason.

    `warning` is set where the choice is not what was asked for or could not be proved; the caller shows it.
    """

    chosen: str
    reason: str
    candidates: dict[str, Candidate]
    warning: str | None = None


def choose(op: str, candidates: Mapping[str, Candidate], margin: float) -> Decision:
    """Chooses by measurement.

    Args:
        op: For messages.
        candidates: By name; the default (`pytorch`) among them.
        margin: The share by which a rival must be faster than the default, e.g. 0.02.
    """
    default = candidates[DEFAULT]
    usable = {name: c for name, c in candidates.items() if c.status == "verified" and c.timed}
    warning = None
    if DEFAULT in usable:
        eligible = [name for name, c in usable.items() if name != DEFAULT and _beats(c, default, margin)]
        chosen = min(eligible, key=lambda name: _total(usable[name]), default=DEFAULT)
    elif usable:
        chosen = min(usable, key=lambda name: _total(usable[name]))
        warning = f"op '{op}': the default is {_verdict(default)}; using {chosen}, the fastest that is verified"
    else:
        chosen = DEFAULT
        if default.status not in ("verified", "not_tried"):
            warning = f"op '{op}': no candidate passed, so the default is used although it is {_verdict(default)}"
    told = {name: _with_reason(name, c, chosen, candidates, margin) for name, c in candidates.items()}
    return Decision(chosen, told[chosen].reason, told, warning)


def confirmed(
    op: str,
    alone: Decision,
    step: StepEvidence | None,
    trials: Sequence[StepTrial],
    *,
    unanswered: str = "",
    default_runs: bool = True,
) -> Decision:
    """What the step makes of a choice by measurement.

    Args:
        op: The op.
        alone: What its implementations show each by itself.
        step: What the step says of whole plans, None if it did not come to that.
        trials: Of the op in the step, in order.
        unanswered: Why the step did not come to that, nothing if it was not to.
        default_runs: Whether the default plan runs in the step, as far as is known.
    """
    last = {trial.name: trial for trial in trials}
    if step is None:
        return _unconfirmed(alone, last, unanswered, default_runs)
    chosen = step.chosen.choice[op]
    told = dict(alone.candidates)
    as_a_whole = step.chosen == step.default and any(trial.status == "accepted" for trial in last.values())
    for name, trial in last.items():
        kept = name == chosen
        reason = trial.reason
        if kept:
            reason = f"best in the step: {trial.reason}"
        elif trial.status == "accepted":
            reason = f"accepted at first ({trial.reason}), then given up{' with the whole plan' if as_a_whole else ''}"
        told[name] = told[name].model_copy(update={"reason": reason})
    if chosen == DEFAULT and last:
        why = step.reason if as_a_whole else "no rival makes the step better"
        if step.chosen != step.default and all(trial.reason == not_called(op) for trial in last.values()):
            why = not_called(op)
        told[DEFAULT] = told[DEFAULT].model_copy(update={"reason": f"the default: {why}"})
    if chosen != alone.chosen and alone.chosen not in last:
        untried = f"{told[alone.chosen].reason} alone; not tried in the step: kernels.budget_seconds was used up"
        told[alone.chosen] = told[alone.chosen].model_copy(update={"reason": untried})
        told[chosen] = told[chosen].model_copy(update={"reason": "kept: its rival was not tried in the step"})
    return Decision(chosen, told[chosen].reason, told, alone.warning)


def not_called(op: str) -> str:
    """The reason of a trial that was spared."""
    return f"the chosen plan does not call {op}"


def _unconfirmed(alone: Decision, last: Mapping[str, StepTrial], unanswered: str, default_runs: bool) -> Decision:
    """Without the step's answer the default stays, unless it is not proved or does not run; then no implementation
    takes its place that the step has refused."""
    told, chosen = dict(alone.candidates), alone.chosen
    refused = {name for name, trial in last.items() if trial.status != "accepted"}
    if told[DEFAULT].status == "verified" and default_runs:
        chosen = DEFAULT
    elif chosen in refused:
        proved = [n for n, c in told.items() if c.status == "verified" and c.timed and n not in refused]
        chosen = min(proved, key=lambda name: _total(told[name]), default=DEFAULT)
    reasons = {name: last[name].reason for name in refused}
    if chosen != alone.chosen:
        silent = f"the step was not asked: {unanswered}" if not last else f"the step gave no answer: {unanswered}"
        faster = told[alone.chosen].speedup
        alone_reason = f"faster alone ({faster:.2f}x)" if faster is not None else told[alone.chosen].reason
        reasons = {alone.chosen: f"{alone_reason}; {silent}"} | reasons
        reasons[chosen] = f"{'the default' if chosen == DEFAULT else 'the fastest that is left'}: {silent}"
    if chosen != DEFAULT and not default_runs:
        reasons[chosen] = f"{reasons.get(chosen, told[chosen].reason)}; not confirmed: PyTorch's plan does not run"
    told |= {name: told[name].model_copy(update={"reason": reason}) for name, reason in reasons.items()}
    return Decision(chosen, told[chosen].reason, told, alone.warning)


def force(op: str, candidates: Mapping[str, Candidate], name: str, cause: str, *, fallback: bool) -> Decision:
    """Takes the implementation that the user asked for, if the gate lets it through.

    Args:
        op: The op.
        candidates: What is known, `name` among it. The default may be missing.
        name: The implementation that was asked for.
        cause: What asked: `kernels=triton`, `kernels.pin.rms_norm=triton`, ...
        fallback: Whether PyTorch may take the place of one that cannot be used. A wrong one is an error always.

    Raises:
        UserError: it is wrong; or it cannot be used and there is no fallback.
    """
    default = candidates.get(DEFAULT)
    told = {n: _with_speedup(c, default) for n, c in candidates.items()}
    asked = candidates[name]
    if name == DEFAULT or asked.status == "verified":
        told[name] = told[name].model_copy(update={"reason": f"asked for by {cause}"})
        return Decision(name, told[name].reason, told)
    why = _verdict(asked)
    told[name] = told[name].model_copy(update={"reason": why})
    if asked.status == "wrong":
        raise UserError(
            f"{cause}: implementation '{name}' of op '{op}' is not used because it is {why}; "
            f"use kernels=auto, or kernels.pin.{op}={DEFAULT}"
        )
    if not fallback:
        raise UserError(
            f"{cause}: implementation '{name}' of op '{op}' cannot be used here: {why}; use kernels=auto, "
            f"kernels.pin.{op}={DEFAULT}, or kernels.on_unavailable=fallback"
        )
    reason = f"in place of {name}, which {cause} asks for"
    told[DEFAULT] = told.get(DEFAULT, Candidate(status="not_tried")).model_copy(update={"reason": reason})
    warning = f"op '{op}': {DEFAULT} {reason}, because that is {why} (kernels.on_unavailable=fallback)"
    return Decision(DEFAULT, reason, told, warning)


def _beats(rival: Candidate, default: Candidate, margin: float) -> bool:
    return _total(rival) * (1 + margin) < _total(default) and not _overlap(rival, default)


def _overlap(a: Candidate, b: Candidate) -> bool:
    """Whether the confidence intervals of two timed candidates have a point in common."""
    (a_low, a_high), (b_low, b_high) = _interval(a), _interval(b)
    return a_low <= b_high and b_low <= a_high


def _interval(candidate: Candidate) -> tuple[float, float]:
    assert candidate.total_ms_low is not None
    assert candidate.total_ms_high is not None
    return candidate.total_ms_low, candidate.total_ms_high


def _total(candidate: Candidate) -> float:
    assert candidate.total_ms is not None
    return candidate.total_ms


def _with_speedup(candidate: Candidate, default: Candidate | None) -> Candidate:
    if default is None or default.total_ms is None or candidate.total_ms is None:
        return candidate
    return candidate.model_copy(update={"speedup": default.total_ms / candidate.total_ms})


def _with_reason(
    name: str, candidate: Candidate, chosen: str, candidates: Mapping[str, Candidate], margin: float
) -> Candidate:
    default, winner = candidates[DEFAULT], candidates[chosen]
    candidate = _with_speedup(candidate, default)
    return candidate.model_copy(update={"reason": _reason(name, candidate, chosen, winner, default, margin)})


def _reason(name: str, candidate: Candidate, chosen: str, winner: Candidate, default: Candidate, margin: float) -> str:
    if not candidate.timed or candidate.status != "verified":
        return _verdict(candidate) if name != chosen else f"the default; {_verdict(candidate)}"
    times = "" if candidate.speedup is None else f"{candidate.speedup:.2f}x"
    gain = f"{times} {DEFAULT}" if times else ""
    if name == chosen:
        if name == DEFAULT:
            return "the default: no verified rival is faster"
        return f"fastest: {gain}" if gain else f"fastest of those verified; {DEFAULT} is not"
    if name == DEFAULT or not (default.timed and default.status == "verified"):
        return f"slower than {chosen} ({_total(winner) / _total(candidate):.2f}x)"
    if _overlap(candidate, default):
        slower = "slower, " if _total(candidate) > _total(default) else ""
        return f"{slower}within noise of {DEFAULT} ({times})"
    if _total(candidate) > _total(default):
        return f"slower than {DEFAULT} ({gain})"
    if not _beats(candidate, default, margin):
        return f"gains less than kernels.margin={margin:g} over {DEFAULT} ({times})"
    return f"slower than {chosen} ({_total(winner) / _total(candidate):.2f}x); {gain}"


def _verdict(candidate: Candidate) -> str:
    """`wrong: gradient of x off by 2 %`, or the reason alone where it says everything."""
    words = candidate.status.replace("_", " ")
    if candidate.status == "verified":
        return candidate.reason or "verified, not timed"
    if not candidate.reason or candidate.reason.startswith(words):
        return candidate.reason or words
    if candidate.status in ("not_tried", "timed_out", "crashed"):
        return candidate.reason
    return f"{words}: {candidate.reason}"
