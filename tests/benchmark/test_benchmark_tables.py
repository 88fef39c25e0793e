"""A benchmark's tables, notes and page: they fit, and say what is so."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from llmmed.benchmark import results, tables
from llmmed.benchmark.page import _origin, write_page
from llmmed.benchmark.results import OpsResult, Origin, Result, write
from llmmed.errors import UserError
from tests.benchmark.samples import NAMES, ops_result, origin, step_result


@pytest.mark.parametrize("width", [80, 140])
def test_the_tables_fit_on_a_terminal_with_every_number_of_a_gpu(width: int) -> None:
    for result in (ops_result([*NAMES, "triton_recompute"], ["linear_cross_entropy"]), step_result()):
        console = Console(width=width, record=True, file=io.StringIO())
        tables.show(result, console)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        told = " ".join(" ".join(lines).split())
        for number in ("1.0e-03", "3.75", "0.500", "0.50", "900") if isinstance(result, OpsResult) else (
            "123,456", "65.5", "45.7", "12.34", "30.5 (9.5)"
        ):  # fmt: skip
            assert number in told, number
        assert "broken: crashed: it | crashed" in told or "unavailable: not installed" in told


def shown(result: Result, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    tables.show(result, console)
    return console.export_text().splitlines()


def test_whole_steps_come_by_speed_beside_compiled_plain_pytorch() -> None:
    whole = step_result()
    speeds = {"ours_auto": 300.0, "plain_graphs": 250.0, "plain_compiled": 200.0, "hf_liger": 500.0}
    rows = [row.model_copy(update={"tokens_per_second": speeds[row.contestant]})
            for row in whole.rows if row.contestant in speeds]  # fmt: skip
    result = whole.model_copy(update={"rows": rows})
    lines = shown(result, 80)
    names = [line.split("  ")[1] for line in lines if re.match(r"  \S+ \S+.* \d", line)]
    assert [name.split(",")[0] for name in names][:2] == ["Hugging Face + Liger", "llmmed"]
    head = next(place for place, line in enumerate(lines) if line.startswith("verified and timed"))
    body = lines[head + 1 : lines.index("", head)]
    assert len(body) > len(rows)  # a name is folded
    assert all(line.startswith("  ") for line in body)
    ratios = ["2.00", "1.20", "1.00", "0.80"]
    assert re.findall(r" (\d\.\d\d) +65\.5", "\n".join(lines)) == ratios
    assert re.findall(r"\| (\d\.\d\d) \| 65\.5", tables.markdown(rows)) == ratios


def test_equal_reasons_are_one_line() -> None:
    one = ops_result(["pytorch"], ["rotary"])
    gone = [one.rows[-1].model_copy(update={"implementation": name, "status": "unavailable", "reason": "no GPU"})
            for name in ("flash", "liger")]  # fmt: skip
    lines = shown(one.model_copy(update={"rows": [one.rows[0], *gone]}), 80)
    assert [line.strip() for line in lines if "no GPU" in line] == ["flash, liger: unavailable: no GPU"]


def test_notes_say_what_is_so() -> None:
    gpu = ops_result(["pytorch", "liger"], ["rotary", "rms_norm"])
    assert "cold cache" in tables.note(gpu)
    assert "they are given in: rotary. They get copies" in tables.note(gpu)
    cpu = gpu.model_copy(update={"rows": [
        row.model_copy(update={"host_ms": None, "peak_memory_mib": None})
        for row in gpu.rows if row.implementation == "pytorch"
    ]})  # fmt: skip
    assert "cold cache" not in tables.note(cpu)
    whole = step_result()
    alone = [row for row in whole.rows if not row.contestant.startswith("hf_")]
    assert "gets no mask" in tables.note(whole)
    assert "gets no mask" not in tables.note(whole.model_copy(update={"rows": alone}))
    for name, told in (("pytorch", False), ("triton", True)):
        rows = [row.model_copy(update={"kernels": {"swiglu_mlp": name}}) for row in whole.rows]
        assert ("holds the products" in tables.note(whole.model_copy(update={"rows": rows}))) == told
    assert "Liger" not in tables.note(cpu)


def origin_on_cpu() -> Origin:
    gpu = origin()
    return gpu.model_copy(update={"hardware": gpu.hardware.model_copy(update={"device": "A CPU", "cuda": None})})


def test_the_page_and_the_plots_come_from_the_json_alone(tmp_path: Path) -> None:
    write(ops_result(NAMES[:2], ["rotary"]), tmp_path / "a")
    write(step_result(), tmp_path / "b")
    page = tmp_path / "docs" / "results.md"
    write_page([tmp_path / "a", tmp_path / "b"], page)
    text = page.read_text()
    for told in ("A GPU", "torch 2.11", "driver 1.0", "2000-01-01", "commit abc", "python scripts/benchmark.py",
                 "copy 3,000 GB/s", "bfloat16 products 800 TFLOP/s", "crashed: it \\| crashed", "123,456",
                 "120,000-130,000", "45.7", "12.34", "30.5 (9.5)", "unavailable: not installed",
                 "123.0 M parameters", "rotary triton", "## Kernels on A GPU",
                 "## Training steps of base with adamw on A GPU"):  # fmt: skip
        assert told in text, told
    for target in re.findall(r"\]\((\S+?)\)", text):
        assert (page.parent / target).stat().st_size > 0, target
    assert {path.name for path in (tmp_path / "a").glob("*.png")} == {
        "ops_time_bfloat16_eager.png", "ops_speedup_bfloat16_eager.png", "ops_memory_bfloat16_eager.png"
    }  # fmt: skip

    # The same again from what lies beside the page.
    command = re.search(r"report=(\S+) page=(\S+)`", text)
    assert command is not None
    assert command[2] == str(page)
    assert "Python 3.11, A CPU" in text
    assert "; took 34 s" in text
    write_page([Path(folder) for folder in command[1].split(",")], page)
    assert page.read_text() == text

    # Two of the same kind do not write over each other.
    write(step_result(), tmp_path / "c")
    write_page([tmp_path / "b", tmp_path / "a", tmp_path / "c"], page)
    folders = {path.name for path in page.with_suffix("").iterdir()}
    assert folders == {"ops", "step_base_adamw", "step_base_adamw_3"}

    assert "".join(_origin(origin_on_cpu(), 1.0)).count("A CPU") == 1
    of_a_run = {"remark": "A busy machine."}
    assert "**Remark.** A busy machine." in "".join(_origin(origin_on_cpu().model_copy(update=of_a_run), 1.0))
    assert results.origin("cpu", {}, ["scripts/benchmark.py", "ops=rotary", "hydra.run.dir=x"]).command == (
        "python scripts/benchmark.py ops=rotary"
    )
    (tmp_path / "a" / "ops.json").write_text("{}")
    with pytest.raises(UserError, match="is not the result of a benchmark"):
        write_page([tmp_path / "a"], page)
    with pytest.raises(UserError, match=r"no ops\.json or step\.json"):
        write_page([tmp_path], page)
