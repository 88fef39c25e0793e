"""What of this machine is ours, and what is installed on it. Imports the standard library alone."""

from __future__ import annotations

import importlib.metadata
import os


def cores() -> int:
    """The processor cores that this process may run on: of a shared machine perhaps a few of many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_version(package: str) -> str | None:
    """Of a distribution, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
