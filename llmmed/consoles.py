"""The terminal, or the file that stands for it."""

from __future__ import annotations

import os
import signal
import sys

from rich.console import Console

from llmmed.signals import reader_is_gone

_FILE_WIDTH = 140  # of lines in a file, which nobody folds


class _Patient(Console):
    """Where the reader is gone, a run does what `reader_is_gone` says, and anything else ends, but for under nohup."""

    def on_broken_pipe(self) -> None:
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            super().on_broken_pipe()
        self.quiet = True
        reader_is_gone(self.file.fileno())


def output() -> Console:
    """Standard output. In a file tables are as wide as they like, unless `COLUMNS` says otherwise."""
    console = _Patient(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    return console


def errors() -> Console:
    """Standard error, where lines are as long as they are."""
    return _Patient(stderr=True, highlight=False, soft_wrap=True)


def answered_help(text: str | None) -> bool:
    """Prints what a script says of itself if somebody asked for help, and whether somebody did."""
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return False
    print((text or "").strip())
    return True
