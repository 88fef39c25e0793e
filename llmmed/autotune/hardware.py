"""What measurements depend on, told without a CUDA context: asked of the driver's management library and of `/proc`."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from pathlib import Path

import torch

from llmmed.autotune.plan import Hardware
from llmmed.machine import installed_version

logger = logging.getLogger(__name__)


def describe_hardware(device: str) -> Hardware:
    """This machine, for a run on `cuda` or `cpu`. On a GPU whose name the driver does not tell, it is `unknown GPU`."""
    cpu = _cpu_name()
    name, driver = _first_gpu() if device == "cuda" else (cpu, None)
    return Hardware(
        device=name or UNKNOWN_GPU,
        driver=driver,
        cuda=torch.version.cuda if device == "cuda" else None,
        torch=torch.__version__,
        triton=installed_version("triton"),
        python=platform.python_version(),
        cpu=cpu,
        cpu_threads=torch.get_num_threads(),
    )


UNKNOWN_GPU = "unknown GPU"


def _first_gpu() -> tuple[str | None, str | None]:
    """Name and driver version of the first GPU that this process may see, through NVML, or Nones."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None, None
    if nvml.nvmlInit_v2() != 0:
        return None, None
    try:
        handle, name, driver = ctypes.c_void_p(), ctypes.create_string_buffer(96), ctypes.create_string_buffer(80)
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        order = os.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")  # set by `llmmed`, if by nobody else
        if first.isdigit() and count.value > 1 and order != "PCI_BUS_ID":
            logger.warning("CUDA_DEVICE_ORDER=%s hides which GPU this is, so that no measurement is kept", order)
            return None, None
        if first.isdigit():
            failed = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(first)), ctypes.byref(handle))
        else:
            failed = nvml.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(handle))
        failed = failed or nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
        failed = failed or nvml.nvmlSystemGetDriverVersion(driver, ctypes.c_uint(len(driver)))
        return (None, None) if failed else (name.value.decode(), driver.value.decode())
    finally:
        nvml.nvmlShutdown()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
