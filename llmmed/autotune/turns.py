"""Runs that want the same plan at the same time: one tunes, the others wait for what it finds."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from llmmed.files import cache_folder, try_lock

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


@contextlib.contextmanager
def turn(key: str, seconds: float) -> Iterator[None]:
    """Entered when no other run tunes for this fingerprint, or after so many seconds. It ends with the process, too.

    Where files cannot be locked, everybody tunes at once.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context((cache_folder("plans") / f"{key}.lock").open("ab"))
            deadline, told = time.monotonic() + seconds, False
            while not try_lock(file):
                if time.monotonic() >= deadline:
                    logger.info("the other run has not come to its end; tuning beside it")
                    break
                if not told:
                    logger.info("another run is tuning the same; waiting for its plan, %.0f s at most", seconds)
                    told = True
                time.sleep(_POLL_SECONDS)
        yield
