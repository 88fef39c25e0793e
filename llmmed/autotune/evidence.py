"""What a tuning process found out, as the cache keeps it: whole, or as far as it came, to be gone on with."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from llmmed.autotune.child import Findings
from llmmed.autotune.journal import LAST_MATCH, Task
from llmmed.autotune.plan import Candidate, Ceilings, StepEvidence, StepTrial

# What a verdict says that may be the moment's doing: a busy machine, memory that another program held.
_PASSING = ("SIGKILL", "out of memory", "kernels.candidate_seconds")


class Evidence(BaseModel):
    """What a tuning process found: per op and implementation, the ceilings if it measured any, the step's answer.

    `trials` are those in the step, whether or not it came to an answer. Without one, `step_reason` says why, and
    `default_runs` is false where that is because the default plan does not run. What is not `finished` is gone on with
    next time. `doubted` are those whose verdict may have been the moment's doing: they have had a second chance.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ops: dict[str, dict[str, Candidate]]
    ceilings: Ceilings | None = None
    step: StepEvidence | None = None
    trials: list[StepTrial] = Field(default_factory=list)
    step_reason: str = ""
    default_runs: bool = True
    finished: bool = True
    doubted: list[str] = Field(default_factory=list)


def evidence_of(findings: Findings, before: Evidence | None, *, finished: bool) -> Evidence:
    """All that is known, after what was known before."""
    return Evidence(
        ops=findings.ops,
        ceilings=findings.ceilings,
        step=findings.step or _still_holds(before, findings),
        trials=findings.trials,
        step_reason=findings.step_reason or findings.cut_short,
        default_runs=findings.default_runs,
        finished=finished and not findings.cut_short and (findings.step is None or findings.step.finished),
        doubted=before.doubted if before is not None else [],
    )


def lasting(evidence: Evidence) -> Evidence:
    """What is worth keeping: nothing that was not tried, and no verdict for good that may have been the moment's doing.

    Such a one is left out the first time, so that the next run tries again, and kept the second.
    """
    doubted = list(evidence.doubted)

    def is_kept(said: str, who: str) -> bool:
        if who in doubted or not any(words in said for words in _PASSING):
            return True
        doubted.append(who)
        return False

    ops: dict[str, dict[str, Candidate]] = {}
    for op, found in evidence.ops.items():
        for name, candidate in found.items():
            said = f"{candidate.status.replace('_', ' ')}: {candidate.reason}"
            tried = candidate.status != "not_tried"
            if tried and (candidate.status == "verified" or is_kept(said, f"{op}.{name}")):
                ops.setdefault(op, {})[name] = candidate
    trials = [
        trial
        for trial in evidence.trials
        if trial.status != "failed" or is_kept(trial.reason, f"{trial.op}.{trial.name} in the step")
    ]
    kept: dict[str, object] = {"ops": ops, "trials": trials}
    step = evidence.step
    if step is not None and step.chosen == step.default and not is_kept(step.reason, LAST_MATCH):
        kept["step"] = None
    if not evidence.default_runs and not is_kept(evidence.step_reason, "the default plan"):
        kept |= {"default_runs": True, "step_reason": ""}
    finished = evidence.finished and doubted == evidence.doubted
    return evidence.model_copy(update=kept | {"finished": finished, "doubted": doubted})


def findings_of(evidence: Evidence | None, tasks: Sequence[Task]) -> Findings:
    """Where tuning goes on: verdicts and trials stand; an op is measured if all of its candidates were, together."""
    findings = Findings()
    if evidence is None:
        return findings
    findings.ceilings, findings.trials = evidence.ceilings, list(evidence.trials)
    for task in tasks:
        known = {name: c for name, c in evidence.ops.get(task.op, {}).items() if name in task.verify}
        verified = {name for name, c in known.items() if c.status == "verified"}
        findings.ops[task.op] = known
        if task.measure and len(known) == len(task.verify) and all(known[name].timed for name in verified):
            findings.measured.add(task.op)
        in_turn = task.op in findings.measured
        findings.launched[task.op] = {name for name in verified if in_turn or known[name].launches}
    return findings


def _still_holds(before: Evidence | None, findings: Findings) -> StepEvidence | None:
    """An earlier answer of the step, where there was no time for another and nothing has been found against it."""
    if before is None or before.step is None or not findings.default_runs:
        return None
    last = {(trial.op, trial.name): trial.status for trial in findings.trials}
    proved = {(op, name) for op, found in findings.ops.items() for name, c in found.items() if c.status == "verified"}
    chosen = {flip for flip in before.step.chosen.choice.items() if flip not in before.step.default.choice.items()}
    return before.step if chosen <= proved and all(last.get(flip) != "failed" for flip in chosen) else None
