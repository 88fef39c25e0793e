"""What W&B was given, read back from its own offline file."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from llmmed.compose import as_dict, compose
from llmmed.reporting.wandb_sink import open_wandb
from llmmed.training.metrics import Sample

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
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if place in (1, 4):  # whole, or the last chunk
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


@pytest.mark.slow
def test_metrics_summary_and_configuration_are_in_the_offline_file(tmp_path: Path) -> None:
    config = compose(
        ["experiment=smoke", "data=synthetic", "logger=wandb", "logger.project=proof", "logger.tags=[a,b]"]
    )
    sink = open_wandb(config, tmp_path, as_dict(config))
    assert sink is not None
    for step in (1, 2, 3):
        sink.log({"loss": 1.0 / step}, step)
    sink.log_samples([Sample("The heart", " beats.")], 3)
    sink.finish({"kernels/rms_norm": "triton", "use_triton_rmsnorm": True, "final/val_loss": 0.25}, "finished")

    file = next((tmp_path / "wandb").glob("offline-run*/*.wandb"))
    deadline = time.monotonic() + 20
    found = records(file)
    while not any(r.WhichOneof("record_type") == "exit" for r in found):
        assert time.monotonic() < deadline  # W&B's process writes when it comes to it, later on a busy machine
        time.sleep(0.1)
        found = records(file)
    run = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    assert run.project == "proof"
    assert list(run.tags) == ["a", "b"]
    given = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert given["model"]["d_model"] == 64
    assert given["kernels"]["policy"] == "auto"

    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]
    texts = next((tmp_path / "wandb").glob("offline-run*/files/media/table/samples_3_*.json"))
    assert json.loads(texts.read_text()) == {"columns": ["prompt", "text"], "data": [["The heart", " beats."]]}
    assert [(entry["_step"], entry["loss"]) for entry in history] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]

    summary = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.summary.update}
    assert summary["kernels/rms_norm"] == "triton"
    assert summary["use_triton_rmsnorm"] is True
    assert summary["final/val_loss"] == 0.25
    assert summary["status"] == "finished"


def test_switched_off_is_none(tmp_path: Path) -> None:
    config = compose(["experiment=smoke", "data=synthetic"])
    assert config.logger.mode == "disabled"
    assert open_wandb(config, tmp_path, {}) is None
