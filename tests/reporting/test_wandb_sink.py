"""What W&B was given, read back from its own offline file."""

from __future__ import annotations

import json
import logging
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from llmmed.compose import as_dict, compose
from llmmed.reporting.wandb_sink import open_wandb
from llmmed.training.metrics import Sample
from tests.reporting.test_kernel_table import make_plan

pytest.importorskip("wandb")


BLOCK = 32768  # the file is a LevelDB log: blocks of chunks, each with checksum, length and place in its record


def records(file: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, found, parts = file.read_bytes(), 7, [], b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # no chunk begins in the last bytes of a block
            position += BLOCK - position % BLOCK
            continue
        _, length, place = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):  # still being written
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if place in (1, 4):  # whole, or the last chunk
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def whole_file(file: Path) -> list[Any]:
    """W&B's own process writes the last records after `finish` has returned."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = records(file)
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


@pytest.mark.slow
def test_metrics_summary_plan_and_configuration_are_in_the_offline_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = compose(
        ["experiment=smoke", "data=synthetic", "logger=wandb", "logger.project=proof", "logger.tags=[a,b]"]
    )
    sink = open_wandb(config, tmp_path, as_dict(config))
    assert sink is not None
    plan = make_plan()
    sink.log_plan(plan, tmp_path / "kernels.json")
    plan.model_copy(update={"executed": {"rms_norm": "confirmed"}}).write(tmp_path / "kernels.json")
    for step in (1, 2, 3):
        sink.log({"loss": 1.0 / step}, step)
    sink.log_samples([Sample("The heart", " beats.")], 3)
    sink.finish({"final/val_loss": 0.25}, "finished")

    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    found = whole_file(next((tmp_path / "wandb").glob("offline-run*/*.wandb")))
    run = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    assert run.project == "proof"
    assert list(run.tags) == ["a", "b"]
    updates = [run.config, *(r.config for r in found if r.WhichOneof("record_type") == "config")]
    given = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for update in updates for i in update.update}
    assert {key: given[key] for key in as_dict(config)} == as_dict(config)

    history = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]
    tables = tmp_path.glob("wandb/offline-run*/files/media/table/*.json")
    media = {path.name.partition("_")[0]: json.loads(path.read_text()) for path in sorted(tables)}
    rows = [dict(zip(media["kernel"]["columns"], row, strict=True)) for row in media["kernel"]["data"]]
    assert [(row["op"], row["implementation"], row["verdict"], row["chosen"]) for row in rows] == [
        ("rms_norm", "pytorch", "verified", False),
        ("rms_norm", "liger", "wrong", False),
        ("rms_norm", "triton", "verified", True),
        ("rotary", "pytorch", "not_tried", True),
        ("rotary", "triton", "unavailable", False),
    ]
    assert rows[2]["total ms"] == 0.0412
    assert rows[1]["reason"].startswith("wrong: gradient of weight")
    assert media["step"]["data"] == [["rms_norm (triton)", 0.0412]]
    assert history[0]["_step"] == 0
    assert history[0]["kernel_table._type"] == "table-file"
    assert history[0]["step_breakdown_table._type"] == "table-file"
    assert given["_wandb.visualize.step_breakdown"]["panel_config"]["panelDefId"] == "wandb/bar/v0"
    texts = next((tmp_path / "wandb").glob("offline-run*/files/media/table/samples_3_*.json"))
    assert json.loads(texts.read_text()) == {"columns": ["prompt", "text"], "data": [["The heart", " beats."]]}
    assert [(entry["_step"], entry["loss"]) for entry in history[1:4]] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]

    summary = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.summary.update}
    assert summary["kernels/rms_norm"] == "triton"
    assert summary["kernels/rms_norm/speedup"] == 3.0
    assert summary["use_triton_rotary"] is False
    assert summary["use_triton_rmsnorm"] is True
    assert summary["final/val_loss"] == 0.25
    assert summary["status"] == "finished"

    artifacts = [r.artifact for r in found if r.WhichOneof("record_type") == "artifact"]
    (artifact,) = [artifact for artifact in artifacts if artifact.type == "kernel-plan"]
    assert [entry.path for entry in artifact.manifest.contents] == ["kernels.json"]
    assert artifact.manifest.contents[0].size == (tmp_path / "kernels.json").stat().st_size


def test_switched_off_is_none(tmp_path: Path) -> None:
    config = compose(["experiment=smoke", "data=synthetic"])
    assert config.logger.mode == "disabled"
    assert open_wandb(config, tmp_path, {}) is None
