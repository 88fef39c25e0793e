"""The terminal, or the file that stands for it."""

from __future__ import annotations

import os

from rich.console import Console

_FILE_WIDTH = 140  # of lines in a file, which nobody folds


def output() -> Console:
    """Standard output. In a file tables are as wide as they like, unless `COLUMNS` says otherwise."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    return console


def errors() -> Console:
    """Standard error, where lines are as long as they are."""
    return Console(stderr=True, highlight=False, soft_wrap=True)
