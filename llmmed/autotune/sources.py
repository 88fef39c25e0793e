"""The hashes of sources, by which evidence is known to be of the code that runs: an op's, and other packages'."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmmed.files import sha256_of
from llmmed.kernels import catalog

_PROJECT = Path(__file__).parents[1]
_CODE = {".py", ".pyx", ".so", ".pyd", ".cu", ".cuh", ".cpp", ".cc", ".c", ".h", ".hpp", ".ptx", ".cubin", ".hsaco"}
_READ = 32 * 2**20  # bytes of another package: of a larger one sizes and times of change must do


def project_hash() -> str:
    """Of what verifies, measures, builds and takes the step: the project's code that all evidence depends on."""
    folders = [(_PROJECT / name).rglob("*.py") for name in ("autotune", "model", "optim", "training")]
    files = itertools.chain(*folders, (_PROJECT / "kernels").glob("*.py"))
    return hash_files([*sorted(files), _PROJECT / "compose.py"])


def source_hash(op: str) -> str:
    """Of every Python file in the op's folder, and of every package that registers an implementation for it."""
    parts: list[bytes | str] = [hash_files(sorted(catalog.op_folder(op).rglob("*.py")))]
    for point in _registered(op):
        parts += [point.name, point.value, point.dist.version if point.dist is not None else ""]
        parts += _contents(_package_files(point.module))
    return sha256_of(parts)


def all_found() -> bool:
    """Whether the sources of all implementations of other packages can be told apart from later ones."""
    return all(_package_files(point.module) for op in catalog.op_names() for point in _registered(op))


def hash_files(paths: Iterable[Path]) -> str:
    """Of names and contents."""
    return sha256_of(part for path in paths for part in (path.name, path.read_bytes()))


def _registered(op: str) -> list[importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group=catalog.ENTRY_POINT_GROUP)
    return sorted((point for point in points if point.name.partition(".")[0] == op), key=str)


def _package_files(module: str) -> dict[str, Path]:
    """The code of the whole package that a module is of, by name; empty if it is nowhere to be found.

    It is looked for where an import would find it, without importing it: `pip install -e` leaves nothing beside the
    distribution's metadata.
    """
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError, AttributeError):
        return {}
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        origin = Path(spec.origin or "")
        return {origin.name: origin} if origin.is_file() else {}
    return {str(p.relative_to(root)): p for root in map(Path, spec.submodule_search_locations) for p in _code_in(root)}


def _code_in(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in names if Path(name).suffix in _CODE)


def _contents(files: dict[str, Path]) -> Iterator[bytes | str]:
    stats = {name: files[name].stat() for name in sorted(files)}
    read = sum(stat.st_size for stat in stats.values()) <= _READ
    for name, stat in stats.items():
        yield name
        yield files[name].read_bytes() if read else f"{stat.st_size} {stat.st_mtime_ns}"
