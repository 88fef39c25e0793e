"""Plants bugs into Triton implementations: a module's source with one text replaced, loaded under another name."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmmed.kernels.base import Implementation
from llmmed.kernels.catalog import load_function, op_folder, op_names


def bugs(op: str, table: str = "BUGS") -> Mapping[str, tuple[str, str]]:
    """Those planted into an op's Triton implementation: name -> (text that occurs once, what stands there instead)."""
    if importlib.util.find_spec(f"tests.kernels.bugs.{op}") is None:
        return {}
    found: Mapping[str, tuple[str, str]] = getattr(importlib.import_module(f"tests.kernels.bugs.{op}"), table)
    return found


def ops_with_triton() -> list[str]:
    return [op for op in op_names() if (op_folder(op) / "triton_impl.py").exists()]


def mutant(op: str, bug: str, folder: Path, table: str = "BUGS") -> tuple[Implementation, Callable[..., Any]]:
    """The Triton implementation with a bug in it. Its sources lie in `folder`, where Triton reads them."""
    before, after = bugs(op, table)[bug]
    found = sources(op)
    count = sum(source.count(before) for source in found.values())
    assert count == 1, f"{op}, {bug}: the text occurs {count} times"
    prefix = f"mutant_{op}_{len(sys.modules)}_"
    for stem, source in found.items():
        # Operators are registered under their names once for all in a process.
        changed = source.replace(before, after).replace('"llmmed::', f'"{prefix}::')
        for other in found:
            changed = changed.replace(f"from llmmed.kernels.{op}.{other} import", f"from {prefix}{other} import")
            changed = re.sub(
                rf"from llmmed\.kernels\.{op} import {other}\b", f"import {prefix}{other} as {other}", changed
            )
        _load_module(prefix + stem, changed, folder)
    implementation: Implementation = sys.modules[f"{prefix}triton_impl"].IMPL
    return implementation, load_function(op, implementation)


def sources(op: str) -> dict[str, str]:
    """What an op's Triton implementation is made of, by module, in the order of their imports."""
    folder = op_folder(op)
    found = [
        folder / f"{stem}.py"
        for stem in ("loops", "hopper", "hopper_forward", "hopper_backward", "products", "exponentials", "triton_impl")
    ]
    return {path.stem: path.read_text(encoding="utf-8") for path in found if path.exists()}


def _load_module(name: str, source: str, folder: Path) -> None:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
