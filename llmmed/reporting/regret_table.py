"""What `scripts/regret.py` wrote, of one model or several, as Markdown tables: a row for each plan that was tried."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmmed.autotune.regret import Neighbour
from llmmed.errors import UserError
from llmmed.files import read_json

_PAIRS = 8  # the best: all are in the JSON


def markdown(paths: Sequence[Path]) -> str:
    """Single flips, and the best pairs of flips from PyTorch's plan: what each saves a step, ms with its 95 % interval.

    Raises:
        UserError: a file is none of `scripts/regret.py`'s, or two are of the same model.
    """
    singles: dict[str, dict[str, Neighbour]] = {}  # by model and name
    pairs: dict[str, dict[str, Neighbour]] = {}
    for path in paths:
        model, neighbours = _read(path)
        if model in singles or model in pairs:
            raise UserError(f"show={path}: a second file of {model}; give one of each model")
        for each in neighbours:
            single = each.from_chosen or len(each.flips) < 2
            (singles if single else pairs).setdefault(model, {})[each.name] = each
    tables = [_table("flip", singles, sorted(_names(singles), key=lambda name: _order(name, singles)))]
    if pairs:
        best = sorted(_names(pairs), key=lambda name: -max(_gain(found.get(name)) for found in pairs.values()))
        tables.append(_table("pair", pairs, best[:_PAIRS]))
    return "\n\n".join(tables)


def _read(path: Path) -> tuple[str, list[Neighbour]]:
    try:
        found = read_json(path)
        return found["model"], [Neighbour(**each) for each in found["neighbours"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"show={path}: not what scripts/regret.py writes with out=<path>") from error


def _names(found: dict[str, dict[str, Neighbour]]) -> list[str]:
    return list(dict.fromkeys(name for by_name in found.values() for name in by_name))


def _order(name: str, found: dict[str, dict[str, Neighbour]]) -> tuple[bool, bool, str]:
    """Those beside the chosen plan, then PyTorch's, then those beside that."""
    each = next(by_name[name] for by_name in found.values() if name in by_name)
    return not each.from_chosen, bool(each.flips), name


def _gain(each: Neighbour | None) -> float:
    return each.gain_ms if each is not None and each.gain_ms is not None else float("-inf")


def _table(title: str, found: dict[str, dict[str, Neighbour]], names: Sequence[str]) -> str:
    lines = [f"| {' | '.join([title, *found])} |", f"|---|{len(found) * '---:|'}"]
    lines += [f"| {' | '.join([name, *(_cell(by_name.get(name)) for by_name in found.values())])} |" for name in names]
    return "\n".join(lines)


def _cell(each: Neighbour | None) -> str:
    """Empty where a plan is no neighbour of that model's, or was not tried."""
    if each is None:
        return ""
    if each.gain_ms is None:
        return each.reason.replace("|", "\\|")
    return f"{each.gain_ms:.2f} ({each.gain_ms_low:.2f} to {each.gain_ms_high:.2f})"
