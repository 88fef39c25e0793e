"""Python's garbage collector stands still while PyTorch is imported: it takes a fifth of the time to the first step."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def still() -> Iterator[None]:
    """Within it nothing is collected. What is there at its end, above all modules, is never looked through later."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
