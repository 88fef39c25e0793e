"""The terminal, or the file that stands for it."""

from __future__ import annotations

import os
import signal
import sys

from rich.console import Console

_FILE_WIDTH = 140  # of lines in a file, which nobody folds


class _Patient(Console):
    """Where the reader is gone, `head` or a `tee` that died, a run does as when its terminal closes: it ends in order,
    or under nohup goes on. What is no run ends at once."""

    def on_broken_pipe(self) -> None:
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            super().on_broken_pipe()
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())  # for what is flushed at the end
        os.close(nowhere)
        signal.raise_signal(signal.SIGHUP)


def output() -> Console:
    """Standard output. In a file tables are as wide as they like, unless `COLUMNS` says otherwise."""
    console = _Patient(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    return console


def errors() -> Console:
    """Standard error, where lines are as long as they are."""
    return _Patient(stderr=True, highlight=False, soft_wrap=True)


def helped(text: str | None) -> bool:
    """Whether somebody asked a script for help, and has got what it says of itself."""
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return False
    print((text or "").strip())
    return True
