"""Finds ops and implementations, by name without importing torch, and loads them when they are wanted.

An op is a folder of this package with a `reference.py`. An implementation is a module of that folder that defines
`IMPL`, or an entry point `<op>.<name>` of the group `llmmed.kernels` in any installed package, whose value is an
`Implementation`. Where an op has a PyTorch implementation, `compiled` (the same, through `torch.compile`) is generated.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmmed.kernels.base import Implementation, Kernels, Op
    from llmmed.kernels.tunable import Launches

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "llmmed.kernels"
DEFAULT = "pytorch"
COMPILED = "compiled"

_FOLDER = Path(__file__).parent
_DEFINES_IMPL = re.compile(r"^IMPL\b[^=\n]*=", re.MULTILINE)


def op_names() -> tuple[str, ...]:
    """The names of all ops, sorted. Imports nothing."""
    return tuple(sorted(path.parent.name for path in _FOLDER.glob("*/reference.py")))


def implementation_names(op: str) -> tuple[str, ...]:
    """The names of an op's implementations, the default first. Imports none of them. Raises `KeyError`."""
    if op not in op_names():
        raise KeyError(op)
    names = set(_modules(op)) | set(_entry_points(op))
    if DEFAULT in names:
        names.add(COMPILED)
    order = {DEFAULT: 0, COMPILED: 1}
    return tuple(sorted(names, key=lambda name: (order.get(name, 2), name)))


def no_such_implementation(op: str, name: str) -> str:
    """What to say of it."""
    return f"op '{op}' has no implementation '{name}'; it has {', '.join(implementation_names(op))}"


def get_op(name: str) -> Op:
    """Imports an op. Raises `KeyError` for an unknown one."""
    if name not in op_names():
        raise KeyError(name)
    op: Op = importlib.import_module(f"llmmed.kernels.{name}").OP
    return op


def get_implementation(op: str, name: str) -> Implementation:
    """Imports one implementation's description; its own imports happen in `load`.

    Raises:
        KeyError: no such op or implementation.
        Unavailable: its module cannot be imported here.
    """
    from llmmed.kernels.base import Implementation, Unavailable

    if name not in implementation_names(op):
        raise KeyError(name)
    if name == COMPILED:
        return _compiled(get_implementation(op, DEFAULT))
    try:
        if name in _modules(op):
            found = importlib.import_module(_modules(op)[name]).IMPL
        else:
            found = _entry_points(op)[name].load()
    except (Exception, SystemExit) as error:  # a candidate that breaks on import must not take the run with it
        raise Unavailable(f"cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, Implementation):
        raise Unavailable(f"is no Implementation but {type(found).__name__}")
    if found.name != name:
        raise Unavailable(f"calls itself '{found.name}' but stands in a module or entry point named '{name}'")
    return found


def load_kernels(choice: Mapping[str, str], launches: Mapping[str, Mapping[str, Launches]] | None = None) -> Kernels:
    """The table for a choice of one implementation an op. Raises `KeyError` and `Unavailable` like the above.

    `Unavailable` also where `compiled` of an op would have to compile another op's implementation that cannot be.

    `launches`, by op and implementation, say how kernels are launched, by default where they say nothing. That holds
    for the process: two tables with the same implementation launch it alike, as the later one says.
    """
    from llmmed.kernels.base import Kernels

    functions: dict[str, Callable[..., Any]] = {}
    table = Kernels(functions, dict(choice))
    for op, name in choice.items():
        implementation = get_implementation(op, name)
        _check_that_it_compiles(op, name, implementation, choice)
        function = implementation.load()
        take_launches(op, implementation, (launches or {}).get(op, {}).get(name, {}))
        functions[op] = functools.partial(function, kernels=table) if implementation.uses else function
    table.__post_init__()
    return table


def _check_that_it_compiles(op: str, name: str, implementation: Implementation, choice: Mapping[str, str]) -> None:
    """Raises `Unavailable` where `compiled` calls what no compiler can trace, which would fail at the first call."""
    from llmmed.kernels.base import Unavailable

    for used in sorted(with_uses(implementation.uses, choice) if name == COMPILED else ()):
        inner = get_implementation(used, choice[used])
        if choice[used] != COMPILED and not inner.compiles:
            raise Unavailable(
                f"'{COMPILED}' of op '{op}' compiles op '{used}' too, whose implementation '{inner.name}' cannot be "
                f"compiled; choose another for one of them"
            )


def take_launches(op: str, implementation: Implementation, launches: Launches) -> None:
    """Sets an implementation's launches; a warning and the default if it has no such launches."""
    try:
        implementation.take_launches(launches)
    except ValueError as error:
        implementation.take_launches({})
        logger.warning(
            "op '%s': %s is launched by default, since the plan is of another version: %s; tune again with "
            "kernels.cache=refresh", op, implementation.name, error,
        )  # fmt: skip


def load_function(op: str, implementation: Implementation) -> Callable[..., Any]:
    """One implementation by itself; the ops that it calls take their defaults. Raises `Unavailable`."""
    function = implementation.load()
    if not implementation.uses:
        return function
    table = load_kernels(dict.fromkeys(with_uses(implementation.uses, default_choice()), DEFAULT))
    return functools.partial(function, kernels=table)


def default_choice() -> dict[str, str]:
    """Every op with its PyTorch implementation."""
    return dict.fromkeys(op_names(), DEFAULT)


def with_uses(ops: Iterable[str], choice: Mapping[str, str]) -> set[str]:
    """These ops and those that their chosen implementations call in turn. Raises `KeyError` and `Unavailable`."""
    found = set(ops)
    return found.union(*(with_uses(get_implementation(op, choice[op]).uses, choice) for op in found))


def op_folder(op: str) -> Path:
    """Where an op lives; the hash of its sources is part of the tuning cache's key."""
    return _FOLDER / op


@functools.cache
def _modules(op: str) -> dict[str, str]:
    """Implementation name -> module, for the modules of the op's folder that define `IMPL`."""
    return {
        path.stem.removesuffix("_impl"): f"llmmed.kernels.{op}.{path.stem}"
        for path in sorted((_FOLDER / op).glob("*.py"))
        if _DEFINES_IMPL.search(path.read_text(encoding="utf-8"))
    }


def misnamed_entry_points() -> list[str]:
    """What to say of those entry points of other packages that stand for no implementation of an op."""
    told = []
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        op, _, name = point.name.partition(".")
        if op not in op_names() or not name:
            package = point.dist.name if point.dist is not None else "a package"
            known = f"<op>.<name>, and the ops are {', '.join(op_names())}"
            told.append(f"{package} registers '{point.name}' in {ENTRY_POINT_GROUP}, which is not {known}")
    return told


@functools.cache
def _entry_points(op: str) -> dict[str, importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {point.name.partition(".")[2]: point for point in points if point.name.partition(".")[0] == op}


def _compiled(default: Implementation) -> Implementation:
    """The PyTorch implementation through `torch.compile`: a candidate of its own where the step is not compiled."""
    from dataclasses import replace

    import torch

    from llmmed.kernels.base import Unavailable

    def load() -> Callable[..., Any]:
        if torch.cuda.is_available():
            if importlib.util.find_spec("triton") is None:
                raise Unavailable("torch.compile needs Triton on a GPU; pip install triton")
        elif not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise Unavailable("torch.compile needs a C++ compiler on a CPU; install g++")
        compiled: Callable[..., Any] = torch.compile(default.load(), dynamic=False, fullgraph=True)
        return compiled

    return replace(default, name=COMPILED, load=load, compiles=False, per_shape=True, kernel_names=("triton_",))
