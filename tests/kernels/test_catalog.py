"""What an installed package registers may break on import, in any way; the run goes on without it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NoReturn

import pytest

from llmmed import run
from llmmed.compose import compose
from llmmed.errors import UserError
from llmmed.kernels import catalog
from llmmed.kernels.base import Unavailable
from tests.reporting.test_kernel_table import make_plan


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


def test_pins_that_do_not_go_together_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> NoReturn:
        raise Unavailable("linear_cross_entropy cannot be compiled over cross_entropy=planted")

    monkeypatch.setattr(run, "load_kernels", refuses)
    with pytest.raises(UserError, match="cannot be compiled over cross_entropy=planted"):
        run.build(compose(["experiment=smoke", "data=synthetic"]), make_plan())
