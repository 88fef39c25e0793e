"""The tables of `scripts/regret.py`, from its JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from llmmed.autotune.regret import Neighbour
from llmmed.errors import UserError
from llmmed.files import write_json
from llmmed.reporting.regret_table import markdown
from tests.processes import run_script


def written(folder: Path, model: str, neighbours: list[Neighbour]) -> Path:
    path = folder / f"{model}.json"
    write_json(path, {"model": model, "neighbours": [asdict(each) for each in neighbours]})
    return path


def test_a_row_for_each_plan_and_of_pairs_the_best_first(tmp_path: Path, repository: Path) -> None:
    chosen = Neighbour({"rotary": "pytorch"}, True, -1.0, -1.25, -0.5)
    pair = Neighbour({"rotary": "triton", "swiglu": "triton"}, False, -3.0, -3.5, -2.5)
    better = Neighbour({"rotary": "triton", "rms_norm": "triton"}, False, 0.125, -0.5, 1.0)
    failed = Neighbour({"swiglu": "triton"}, reason="out of memory | in the step")
    small = written(tmp_path, "small", [failed, chosen, Neighbour({}, False, -2.0, -2.0, -2.0), pair, better])
    base = written(tmp_path, "base", [chosen])
    expected = """\
| flip | small | base |
|---|---:|---:|
| the chosen, but rotary pytorch | -1.00 (-1.25 to -0.50) | -1.00 (-1.25 to -0.50) |
| PyTorch's plan | -2.00 (-2.00 to -2.00) |  |
| swiglu triton | out of memory \\| in the step |  |

| pair | small |
|---|---:|
| rotary triton, rms_norm triton | 0.12 (-0.50 to 1.00) |
| rotary triton, swiglu triton | -3.00 (-3.50 to -2.50) |"""
    assert markdown([small, base]) == expected
    done = run_script(repository / "scripts" / "regret.py", [f"show={small},{base}"], tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, expected)


def test_what_is_no_result_is_told_in_a_line(tmp_path: Path) -> None:
    for content in ({"model": "small"}, {"model": "small", "neighbours": [{"gain": 1.0}]}, []):
        write_json(tmp_path / "a.json", content)
        with pytest.raises(UserError, match=r"show=.*a\.json: not what scripts/regret\.py writes"):
            markdown([tmp_path / "a.json"])
    small = written(tmp_path, "small", [Neighbour({}, False, -2.0, -2.0, -2.0)])
    with pytest.raises(UserError, match=r"show=.*small\.json: a second file of small"):
        markdown([small, small])
    with pytest.raises(UserError, match=r"show=.*none\.json"):
        markdown([tmp_path / "none.json"])


def test_the_page_has_the_numbers_of_its_json(repository: Path) -> None:
    folder = repository / "docs" / "results"
    files = [folder / "regret" / f"{model}.json" for model in ("small", "base", "medium", "large")]
    assert markdown(files) in (folder / "regret.md").read_text()
