"""What of this machine is ours."""

from __future__ import annotations

import os


def cores() -> int:
    """The processor cores that this process may run on: of a shared machine perhaps a few of many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
