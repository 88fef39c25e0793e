"""Plants bugs into Triton implementations: the module's source with one text replaced, loaded under another name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmmed.kernels.base import Implementation
from llmmed.kernels.catalog import load_function, op_folder, op_names


def bugs(op: str) -> Mapping[str, tuple[str, str]]:
    """The bugs planted into an op's `triton_impl.py`: name -> (text that occurs once, what stands there instead)."""
    if importlib.util.find_spec(f"tests.kernels.bugs.{op}") is None:
        return {}
    found: Mapping[str, tuple[str, str]] = importlib.import_module(f"tests.kernels.bugs.{op}").BUGS
    return found


def ops_with_triton() -> list[str]:
    return [op for op in op_names() if (op_folder(op) / "triton_impl.py").exists()]


def mutant(op: str, bug: str, folder: Path) -> tuple[Implementation, Callable[..., Any]]:
    """The Triton implementation with a bug in it. Its source lies in `folder`, where Triton reads it."""
    before, after = bugs(op)[bug]
    source = (op_folder(op) / "triton_impl.py").read_text(encoding="utf-8")
    assert source.count(before) == 1, f"{op}, {bug}: the text occurs {source.count(before)} times"
    name = f"mutant_{op}_{len(sys.modules)}"
    # Operators are registered under their names once for all in a process.
    changed = source.replace(before, after).replace('"llmmed::', f'"{name}::')
    path = folder / f"{name}.py"
    path.write_text(changed, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    implementation: Implementation = module.IMPL
    return implementation, load_function(op, implementation)
