"""What an installed package registers may break on import, in any way; the run goes on without it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NoReturn

import pytest

from llmmed.kernels import catalog
from llmmed.kernels.base import Unavailable


def leaves() -> NoReturn:
    raise SystemExit("a GPU is needed")


@pytest.mark.parametrize(
    ("load", "told"),
    [
        (leaves, "cannot be imported: SystemExit: a GPU is needed"),
        (lambda: print, "is no Implementation but builtin_function_or_method"),
    ],
)
def test_a_package_that_breaks_is_unavailable(
    load: Callable[[], object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_entry_points", lambda op: {"planted": SimpleNamespace(load=load)})
    with pytest.raises(Unavailable, match=told):
        catalog.get_implementation("rms_norm", "planted")
