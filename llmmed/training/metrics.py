"""What is measured while training: `metrics.jsonl`, throughput, MFU, memory, and the picture of the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from llmmed.files import finite, read_metrics, write_atomically

# Dense peak in TFLOP/s for bf16 and fp16 products with sums in fp32, from NVIDIA's data sheets, by the GPU's whole
# name: a slice of one (MIG), a virtual one and a variant of another name (D, Ti, Laptop) compute at other rates.
_PEAK_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA GH200 480GB": 989.0,
    "NVIDIA GH200 120GB": 989.0,
    "NVIDIA GH200 144G HBM3e": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,
    "NVIDIA A800 80GB PCIe": 312.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A10": 125.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
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
    return _PEAK_TFLOPS.get(torch.cuda.get_device_name(device))


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
