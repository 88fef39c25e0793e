"""Launch parameters that a search may choose: a plain function's by default, and a few alternatives to try.

A `Tunable` is asked whenever its kernel is launched, also in the body of an operator that a compiled step calls and
while a CUDA graph is captured. What it answers is this process's choice: `Implementation.take_launches` sets it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import torch  # who reads a plan or compares the jobs of a sweep need not wait for it

MOST_ALTERNATIVES = 6  # of one kernel at one shape: each is compiled, and timed

Values = Mapping[str, int]  # one way to launch a kernel, by parameter


class Site(NamedTuple):
    """A kernel, and what its launch depends on, sorted by name: `(("itemsize", 2), ("width", 768))`."""

    kernel: str
    at: tuple[tuple[str, int], ...]


Launches = Mapping[Site, Values]


class _Parameters(Protocol):
    """What `typing.NamedTuple` makes."""

    def _asdict(self) -> dict[str, Any]: ...


P = TypeVar("P", bound=_Parameters)

_seen: dict[Site, Values] | None = None


class Tunable(Generic[P]):
    """The launch of one kernel, `kernel`.

    Args:
        kernel: Its name; another for what is no kernel's, say the size of a chunk.
        default: `(device, **at) -> parameters`, a `NamedTuple` of ints. `at` are ints: shapes, bytes of an element.
        alternatives: The same for a few others. Each must be right; whether it is fast, and whether it runs at all on
            this device, is found out.
    """

    def __init__(self, kernel: str, default: Callable[..., P], alternatives: Callable[..., Iterable[P]]) -> None:
        self.kernel = kernel
        self._default = default
        self._alternatives = alternatives
        self._chosen: dict[Site, P] = {}

    def __call__(self, device: torch.device, **at: int) -> P:
        """How to launch the kernel now."""
        if not self._chosen and _seen is None:  # without a choice it costs eager mode nothing
            return self._default(device, **at)
        site = Site(self.kernel, tuple(sorted(at.items())))
        parameters = self._chosen.get(site) or self._default(device, **at)
        if _seen is not None:
            _seen[site] = parameters._asdict()
        return parameters

    def default(self, device: torch.device, site: Site) -> Values:
        """What the plain function says."""
        return self._default(device, **dict(site.at))._asdict()

    def alternatives(self, device: torch.device, site: Site) -> list[Values]:
        """What a search may try instead, each once."""
        default = self.default(device, site)
        found: list[Values] = []
        for parameters in self._alternatives(device, **dict(site.at)):
            values = parameters._asdict()
            if values != default and values not in found:
                found.append(values)
        return found[:MOST_ALTERNATIVES]

    def take(self, launches: Launches) -> None:
        """Launches the kernel so from now on, by default where nothing is said. Raises `ValueError`."""
        import torch

        any_device = torch.device("cpu")  # only the names of parameters are wanted
        chosen = {}
        for site, values in launches.items():
            try:
                default = self._default(any_device, **dict(site.at))
            except TypeError:
                raise ValueError(f"the launch of {self.kernel} does not depend on {_names(dict(site.at))}") from None
            if values.keys() != default._asdict().keys():
                raise ValueError(f"{self.kernel} has no launch by {_names(values)} but by {_names(default._asdict())}")
            chosen[site] = type(default)(**values)
        self._chosen = chosen


@contextlib.contextmanager
def seen_launches() -> Iterator[dict[Site, Values]]:
    """Collects how kernels with a `Tunable` are launched within it, in order."""
    global _seen
    before, _seen = _seen, {}
    try:
        yield _seen
    finally:
        _seen = before


def _names(values: Values) -> str:
    return ", ".join(values) or "nothing"
