"""The one exception that means: the user can mend this. It is shown as a single line, without a traceback."""


class UserError(Exception):
    """What was wrong, where, what is allowed, what to try: one line."""
