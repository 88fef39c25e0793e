"""The report's part about the training step: where its time goes, and what the real step said of the kernels tried."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from llmmed.autotune.plan import KernelPlan, StepEvidence, StepTimes, StepTrial
from llmmed.errors import UserError
from llmmed.reporting import plan_shares
from llmmed.reporting.numbers import ABSENT, digits
from llmmed.reporting.plan_shares import Breakdown
from llmmed.reporting.report_html import bars, decimals, swatch, table


def step_section(folder: Path) -> str:
    """HTML; says so where something was not measured."""
    try:
        plan = KernelPlan.read(folder / "kernels.json")
    except UserError:
        return "<p>No kernels were chosen yet.</p>"
    chosen, default = plan_shares.of_chosen(plan), plan_shares.of_default(plan)
    if not chosen.parts and plan.step is None:
        return (
            "<p>Not measured: nothing was timed, because nothing was left to choose "
            f"(policy {plan.policy}). <code>kernels=auto</code> measures.</p>"
        )
    parts = [
        _bars(chosen, default, same=plan.step is None or plan.step.chosen.choice == plan.step.default.choice),
        _notes(plan, chosen),
    ]
    parts.append(_evidence(plan.step) if plan.step is not None else "<p>The step as a whole was not measured.</p>")
    return "".join(parts)


def _bars(chosen: Breakdown, default: Breakdown, *, same: bool) -> str:
    """A stacked bar a choice of kernels, and the same numbers as a table."""
    shown = {"with these kernels": chosen} | ({"with PyTorch's": default} if default.parts and not same else {})
    places = decimals(max(found.step_ms or found.ops_ms for found in shown.values()))
    names = list(dict.fromkeys(part.op for found in shown.values() for part in found.parts))
    place = {name: index for index, name in enumerate(names)}
    values: dict[str, list[tuple[int | None, str, float]]] = {}
    for title, found in shown.items():
        times = {part.op: part.ms for part in found.parts}
        values[title] = [(place[name], name, times[name]) for name in names if name in times]
        if found.rest_ms is not None:
            values[title].append((None, plan_shares.REST, found.rest_ms))
    rows = []
    for name in [*names, plan_shares.REST]:
        cells = [f'<td class="part">{swatch(place.get(name))}{escape(name)}</td>']
        for found in shown.values():
            part = next((part for part in found.parts if part.op == name), None)
            ms = found.rest_ms if name == plan_shares.REST else part.ms if part else None
            used = part.implementation if part else ""
            cells.append(f'<td class="number">{_fixed(ms, places)}</td><td>{escape(used)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    whole = "".join(f'<td class="number">{_fixed(found.step_ms, places)}</td><td></td>' for found in shown.values())
    rows.append(f'<tr class="chosen"><td>the whole step</td>{whole}</tr>')
    headers = ["part of the step", *(text for title in shown for text in (f"{title}, ms", "kernel"))]
    numbers = range(1, len(headers), 2)
    return bars(f"time of a {chosen.whole}", "ms", values) + table(headers, rows, numbers)


def _notes(plan: KernelPlan, chosen: Breakdown) -> str:
    text = (
        f"Each op's time was measured by itself, all its calls of a {chosen.whole}, forward and backward; calls inside "
        f"another op count there."
    )
    if chosen.rest_ms is not None:
        text += " Everything else is the difference to the whole: products, embedding, the optimizer's update."
    elif chosen.step_ms is not None:
        text += " One by one the ops take longer than the whole step, where they overlap: there is no rest to show."
    if plan.step is not None:
        first, second = plan.step.depths
        if first != second:
            text += f" The whole was measured at {first} and {second} layers and extrapolated to all."
    if chosen.untimed:
        text += f" Not timed, and so not in the bars: {', '.join(chosen.untimed)}."
    return f"<p>{escape(text)}</p>"


def _evidence(step: StepEvidence) -> str:
    parts = [f"<p>Outcome: {escape(step.reason)}.</p>"] if step.reason else []
    places = decimals(step.default.ms)
    rows = [_times("these kernels", step.chosen, places)]
    if step.chosen.choice != step.default.choice:
        rows.append(_times("PyTorch's, with what is pinned", step.default, places))
    elif step.last_match is not None:
        rows.append(_times("the plan that the trials left", step.last_match.left, places))
    headers = ["in the real step", "ms a step", "interval at 95 %, ms", "peak memory, GiB"]
    parts.append(table(headers, rows, range(1, 4)))
    others = ", ".join(f"{mode} {digits(ms)} ms" for mode, ms in step.modes.items())
    if others:
        parts.append(f"<p>Modes tried: {others}; trained in {step.mode} mode.</p>")
    if not step.finished:
        parts.append("<p><code>kernels.budget_seconds</code> ended the trials before all were made.</p>")
    if not step.trials:
        return "".join(parts) + "<p>No op had a rival worth a trial in the step.</p>"
    what = f"<p>Trials at {step.trial_depth} layers; gains are those of the whole model, positive is better.</p>"
    memory = any(trial.memory_gain_mib is not None for trial in step.trials)
    headers = ["op", "tried", "in place of", "verdict", "gain, ms", "interval at 95 %, ms"]
    headers += ["memory gain, MiB"] if memory else []
    rows = [_trial(trial, places, memory=memory) for trial in step.trials]
    return "".join(parts) + what + table([*headers, "why"], rows, range(4, len(headers)))


def _times(name: str, times: StepTimes, places: int) -> str:
    memory = ABSENT if times.peak_memory_gib is None else f"{times.peak_memory_gib:.2f}"
    return _row([name], [_fixed(times.ms, places), _interval(times.ms_low, times.ms_high, places), memory])


def _trial(trial: StepTrial, places: int, *, memory: bool) -> str:
    gains = [_fixed(trial.gain_ms, places, "+"), _interval(trial.gain_ms_low, trial.gain_ms_high, places, "+")]
    if memory:
        gains.append(_fixed(trial.memory_gain_mib, 0, "+"))
    why = f'<td class="why">{escape(trial.reason)}</td>'
    return _row([trial.op, trial.name, trial.against, trial.status], gains, why)


def _row(texts: Sequence[str], numbers: Sequence[str], end: str = "") -> str:
    cells = [f"<td>{escape(text)}</td>" for text in texts]
    cells += [f'<td class="number">{number}</td>' for number in numbers]
    return f"<tr>{''.join(cells)}{end}</tr>"


def _interval(low: float | None, high: float | None, places: int, sign: str = "") -> str:
    return ABSENT if low is None or high is None else f"{_fixed(low, places, sign)} to {_fixed(high, places, sign)}"


def _fixed(value: float | None, places: int, sign: str = "") -> str:
    """With `places` digits after the point, so that a column stands in line; `sign` may be `+`."""
    return ABSENT if value is None else f"{value:{sign},.{places}f}"
