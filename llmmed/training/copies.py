"""Whether a run's projections read copies of their weights in 16 bits (`Transformer.keep_copies`)."""

from __future__ import annotations

from llmmed.autotune.plan import Mode
from llmmed.compose import accumulation_steps
from llmmed.config import Config
from llmmed.model import Transformer, flops_per_token

# To issue the update of one matrix with its copy. An H100's host took 4.5 ms longer than for PyTorch's own update of
# `base`, with 50 matrices, and 3.4 ms for `small`, with 26.
_HOST_MS = 0.15
_PACE = 4e14  # FLOP/s of whole steps, on a fast GPU: an H100's
_ROOM = 1.5  # by how much the step has to outlast the issuing
_MATRICES = 4  # of a layer


def keep_copies(model: Transformer, config: Config, mode: Mode) -> None:
    """Lets the model, of this configuration but for its depth, keep copies if the run does."""
    if wanted(config, mode):
        model.keep_copies()


def wanted(config: Config, mode: Mode) -> bool:
    """Not where gradients of several micro-batches are added up, which asks for float32. And only where the host has
    time, since it issues an update over copies matrix by matrix: with CUDA graphs, in steps that are not too short.
    """
    if mode != "graphs" or accumulation_steps(config.train) > 1:
        return False
    arithmetic = flops_per_token(config.model, config.train.seq_len) * config.train.global_batch_tokens
    issued_ms = _HOST_MS * (_MATRICES * config.model.n_layers + 2)
    return 1e3 * arithmetic / _PACE > _ROOM * issued_ms
