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

from llmmed.kernels.ahead_of_time import Launch, _resources


class Compiler:
    """Compiles launches of Gluon kernels for sm_90, into a cache of its own, and reads ptxas' log."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(triton.knobs.cache, "dir", str(folder))
        monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
        self._capsys = capsys

    def compile(self, launch: Launch, most_spilled: int = 0) -> Mapping[str, Any]:
        """Its code by stage. Fails if products wait for registers instead of running beside each other, or if a thread
        spills more than so many bytes, both directions."""
        kernel = getattr(importlib.import_module(launch.module), launch.kernel)
        source = GluonASTSource(kernel, launch.signature, launch.constants, launch.attributes)
        made: Mapping[str, Any] = triton.compile(
            source, target=GPUTarget("cuda", launch.target, 32), options=launch.options
        ).asm
        log = self._capsys.readouterr().out
        registers, *spilled = _resources(log, launch.kernel)
        assert registers == 168
        assert sum(spilled) <= most_spilled
        assert "serialized" not in log
        return made


def stores(code: str) -> int:
    """How often the hardware stores what lies in shared memory. Fails where it does, or multiplies it, before threads
    have handed over what they wrote there: such a race need not show in results."""
    handed_over, found = True, 0
    for line in code.splitlines():
        if "ttg.local_store" in line:
            handed_over = False
        elif "fence_async_shared" in line:
            handed_over = True
        elif "async_tma_copy_local_to_global" in line or "ttng.warp_group_dot " in line:
            assert handed_over, line
            found += "async_tma" in line
    return found


def waits_for_stores(code: str) -> list[int]:
    """How many stores may still be on their way after each wait."""
    return [int(pending) for pending in re.findall(r"async_tma_store_wait {pendings = (\d+)", code)]
