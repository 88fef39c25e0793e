"""What an exception says about the candidate that raised it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llmmed.autotune.plan import Status
from llmmed.kernels.base import Unavailable
from llmmed.training.memory import is_out


def classify(error: BaseException) -> tuple[Status, str]:
    """The status of a candidate that raised, and the reason for the user."""
    if isinstance(error, Unavailable):
        return "unavailable", str(error)
    if any(is_out(cause) for cause in _chain(error)):
        return "out_of_memory", "out of memory"
    modules = {kind.__module__ for kind in type(error).__mro__}
    if any(module.startswith(("torch._dynamo", "torch._inductor", "triton")) for module in modules):
        return "failed_to_compile", one_line(error)
    return "crashed", one_line(error)


def _chain(error: BaseException | None) -> Iterator[Exception]:
    """The exception and what it was raised for: a compiler, or a capture that is broken off, hides what happened."""
    while isinstance(error, Exception):
        yield error
        error = error.__cause__ or error.__context__


_PLACE = re.compile(r"at \d+:\d+:")  # Triton begins with it, then shows the source, and says last what is wrong


def one_line(error: BaseException, limit: int = 200) -> str:
    """`ValueError: the line of the message that tells most`, as a rule the first."""
    while _PLACE.match(str(error)) and error.__cause__ is not None:
        error = error.__cause__  # in a function that the kernel calls
    lines = [line for line in str(error).splitlines() if line.strip(" ^")]
    told = lines[-1 if _PLACE.match(lines[0]) else 0].strip() if lines else ""
    text = f"{type(error).__name__}: {told}" if told else type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
