"""Triton's interpreter without what it does in vain, which is more than half of its time.

By names that are Triton's own affair: those of 3.6 and 3.7, which `pyproject.toml` allows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np


@functools.cache
def spare_interpreter() -> None:
    """Lets the interpreter adapt Triton's language once a launch, and look for no overflow that it would not report.

    At every call of a device function, `tl.sum` among them, it walks through all of the language again, whose functions
    the launch has replaced already; with each sum and product of integers it computes whether they overflow, also where
    no assertion is on; and to look up NumPy's name of a dtype it makes the table of all.
    """
    from triton.runtime import interpreter

    tl, core = interpreter.tl, interpreter.tl.core
    adapt: Callable[[Any], Any] = interpreter._patch_lang
    adapted: set[int] = set()  # which of the two, in the launch that runs

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc]
        def restore(self) -> None:  # at the end of a launch
            super().restore()
            adapted.clear()

    def adapt_once(function: Any) -> Any:
        seen = {id(value) for value in function.__globals__.values() if value is tl or value is core}
        scope = Scope()
        if not seen or not seen <= adapted:
            scope._changes = adapt(function)._changes
            adapted.update(seen)
        return scope

    look_up = functools.cache(interpreter._get_np_dtype)

    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else look_up(scalar)

    interpreter._patch_lang = adapt_once
    interpreter._get_np_dtype = numpy_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
