"""What the compiler made of kernels for Hopper, and what must hold of all that hand data over between warps."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from llmmed.kernels.ahead_of_time import Launch


class Compiler:
    """Compiles launches of Gluon kernels for sm_90, into a cache of its own, and reads ptxas' log."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(triton.knobs.cache, "dir", str(folder))
        monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
        self._capsys = capsys

    def compile(self, launch: Launch) -> Mapping[str, Any]:
        """Its code by stage. Fails if products wait for registers instead of running beside each other."""
        kernel = getattr(importlib.import_module(launch.module), launch.kernel)
        source = GluonASTSource(kernel, launch.signature, launch.constants, launch.attributes)
        made: Mapping[str, Any] = triton.compile(
            source, target=GPUTarget("cuda", launch.target, 32), options=launch.options
        ).asm
        log = self._capsys.readouterr().out
        assert "Used 168 registers" in log
        assert "serialized" not in log
        return made


def stores(code: str) -> int:
    """How often shared memory is stored by the hardware. Fails where it reads what threads have not handed over: such a
    race need not show in results."""
    handed_over, found = True, 0
    for line in code.splitlines():
        if "ttg.local_store" in line:
            handed_over = False
        elif "fence_async_shared" in line:
            handed_over = True
        elif "async_tma_copy_local_to_global" in line:
            assert handed_over, line
            found += 1
    return found


def waits_for_stores(code: str) -> list[int]:
    """How many stores may still be on their way after each wait."""
    return [int(pending) for pending in re.findall(r"async_tma_store_wait {pendings = (\d+)", code)]
