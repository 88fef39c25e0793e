"""What is measured while training: `metrics.jsonl`, throughput, MFU, memory, and the picture of the loss."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from llmmed.files import finite, read_metrics, write_atomically

# Dense peak in TFLOP/s for bf16 and fp16 products, from the vendors' data sheets, by a part of the GPU's name.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "B100": 1750.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


class Sink(Protocol):
    """Something that takes metrics beside the files: W&B."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def finish(self, summary: Mapping[str, object], status: str) -> None: ...


@dataclass(frozen=True)
class Sample:
    """Text that the model wrote: `text` continues `prompt`."""

    prompt: str
    text: str


@runtime_checkable
class SampleSink(Protocol):
    """A sink that takes text too."""

    def log_samples(self, samples: Sequence[Sample], step: int) -> None: ...


class JsonLines:
    """`metrics.jsonl`, `samples.jsonl`: one line an entry, with its step.

    Lines after `from_step` belong to a run that was cut off and are removed; if its evaluation is still `owed`, so is
    what came of one that was cut off.
    """

    def __init__(self, path: Path, from_step: int, *, owed: bool = False) -> None:
        self._path = path
        kept = [
            entry for entry in read_metrics(path)
            if entry["step"] < from_step or (entry["step"] == from_step and not (owed and "loss" not in entry))
        ]  # fmt: skip
        write_atomically(path, "".join(json.dumps(finite(entry)) + "\n" for entry in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Mapping[str, object]) -> None:
        self._file.write(json.dumps(finite({"step": step, **values})) + "\n")

    def close(self) -> None:
        self._file.close()


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The GPU's dense peak for the precision, or None where it is not known or not the precision of the table."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return _peak_of(torch.cuda.get_device_name(device))


def _peak_of(name: str) -> float | None:
    """Whole words only: an RTX A4000 is no A40, and a laptop's GPU is another than the card of that number."""
    if "Laptop" in name:
        return None
    return next((peak for part, peak in _PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def draw_loss(metrics: list[dict[str, float]], path: Path) -> None:
    """`loss.png`: training and validation loss against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("val/loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in metrics if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
