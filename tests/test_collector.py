"""While something is imported nothing is collected; afterwards as before, but for what was imported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest

from llmmed import collector


@pytest.fixture(autouse=True)
def _nothing_frozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.freeze()
    gc.enable()


@pytest.mark.parametrize("on", [True, False])
def test_it_stands_still_and_goes_on_as_it_was(on: bool) -> None:
    (gc.enable if on else gc.disable)()
    with contextlib.suppress(ImportError), collector.still():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() is on
    assert gc.get_freeze_count() > 0
