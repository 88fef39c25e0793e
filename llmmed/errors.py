"""The one exception that means: the user can mend this. It is shown as a single line, without a traceback."""

from pathlib import Path


class UserError(Exception):
    """What was wrong, where, what is allowed, what to try: one line."""


def in_words(error: Exception, folder: Path | None = None) -> str:
    """The message, of what the system refused (a full disk, a right that is missing) with the file, or the folder that
    was written to. An `OSError` that somebody else made has a message of its own."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) or type(error).__name__
    where = error.filename or folder
    return f"{error.strerror}{f': {where}' if where else ''}"
