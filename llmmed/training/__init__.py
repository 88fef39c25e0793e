"""Training: `loop` runs it, `step` is one optimizer step, the rest is what it needs around it.

`execution` sets up the backend, `evaluate` the validation loss, `checkpoint` what is kept, `metrics` what is written,
`progress` what is shown, `signals` how it is stopped.
"""

from llmmed.training.execution import prepare_backend, resolve_compile
from llmmed.training.loop import Result, train
from llmmed.training.signals import Interrupted

__all__ = ["Interrupted", "Result", "prepare_backend", "resolve_compile", "train"]
