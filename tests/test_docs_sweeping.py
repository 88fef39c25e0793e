"""Every command of docs/sweeping-on-a-cluster.md composes, Hydra's own part and the values of every job included."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override

from llmmed import compose, sweep

PAGE = (Path(__file__).parent.parent / "docs" / "sweeping-on-a-cluster.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python scripts/train\.py -m (.+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    overrides = shlex.split(command)
    for override in overrides:
        if override in sweep._PLUGINS:
            pytest.importorskip(sweep._PLUGINS[override][0])
    overrides += sweep.plugin_overrides(overrides)
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = [override for override in parsed if override.is_sweep_override()]
    assert swept
    for choice in range(max(len(values(override)) for override in swept)):
        job = [f"{o.get_key_element()}={pick(o, choice)}" if o in swept else str(o.input_line) for o in parsed]
        assert compose.compose_yaml(job, with_hydra=True).hydra.launcher._target_
        compose.compose(job)


def test_there_are_commands_for_every_plugin() -> None:
    words = {word for command in COMMANDS for word in shlex.split(command)}
    assert set(sweep._PLUGINS) <= words


def pick(override: Override, choice: int) -> str:
    found = values(override)
    return found[min(choice, len(found) - 1)]


def values(override: Override) -> list[str]:
    swept = override.value()
    if isinstance(swept, IntervalSweep):
        return [str(swept.start), str(swept.end)]
    assert isinstance(swept, ChoiceSweep)
    return [str(value) for value in override.sweep_string_iterator()]
