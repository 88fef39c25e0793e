"""Which GPU is measured is told by the driver, and only where its numbers mean what CUDA's mean."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from llmmed.autotune import hardware


def driver(count: int) -> SimpleNamespace:
    """NVML with some GPUs, `GPU 0` and on."""
    named: list[bytes] = []

    def set_value(pointer: Any, value: Any) -> int:
        (pointer._obj if hasattr(pointer, "_obj") else pointer).value = value
        return 0

    return SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlShutdown=lambda: 0,
        nvmlDeviceGetCount_v2=lambda pointer: set_value(pointer, count),
        nvmlDeviceGetHandleByIndex_v2=lambda index, _: named.append(f"GPU {index.value}".encode()),
        nvmlDeviceGetHandleByUUID=lambda uuid, _: named.append(uuid),
        nvmlDeviceGetName=lambda _, buffer, size: set_value(buffer, named[-1]),
        nvmlSystemGetDriverVersion=lambda buffer, size: set_value(buffer, b"580"),
    )


@pytest.mark.parametrize(
    ("count", "visible", "order", "name"),
    [
        (4, "2,3", "PCI_BUS_ID", "GPU 2"),
        (4, "2,3", "FASTEST_FIRST", None),
        (4, "2,3", None, None),
        (4, "GPU-abc", "FASTEST_FIRST", "GPU-abc"),
        (1, None, "FASTEST_FIRST", "GPU 0"),
    ],
)
def test_a_gpu_is_named_where_its_number_says_which_it_is(
    count: int, visible: str | None, order: str | None, name: str | None, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda library: driver(count))
    for variable, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        monkeypatch.delenv(variable, raising=False)
        if value is not None:
            monkeypatch.setenv(variable, value)
    assert hardware.describe_hardware("cuda").device == (name or hardware.UNKNOWN_GPU)
    assert ("no measurement is kept" in caplog.text) == (name is None)


@pytest.mark.parametrize(("given", "found"), [(None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")])
def test_gpus_are_numbered_as_the_driver_does_unless_somebody_says_otherwise(given: str | None, found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_ORDER"}
    command = [sys.executable, "-c", "import llmmed, os; print(os.environ['CUDA_DEVICE_ORDER'])"]
    environment |= {"CUDA_DEVICE_ORDER": given} if given else {}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
