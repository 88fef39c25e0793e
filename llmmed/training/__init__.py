"""Training: `loop` runs it, `step` is one optimizer step, the rest is what it needs around it.

`execution` sets up the backend, `prefetch` brings the batches, `in_flight` tells when steps are finished, `evaluate`
validates, `samples` writes text, `checkpoint` keeps, `metrics` records, `profiling` traces, `progress` shows; `fits`
tries a size.
"""

from llmmed.training.execution import prepare_backend, resolve_compile
from llmmed.training.loop import train
from llmmed.training.result import Result

__all__ = ["Result", "prepare_backend", "resolve_compile", "train"]
