"""Tries whether a micro-batch fits into the GPU's memory: `micro_batch.py` starts it with a configuration as JSON.

Exit code 0 if it does, `micro_batch.TOO_LARGE` if not. A process of its own, so that nothing of it stays on the device.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from pydantic import TypeAdapter

from llmmed.compose import accumulation_steps
from llmmed.config import Config
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.micro_batch import TOO_LARGE
from llmmed.model import Transformer
from llmmed.processes import end_with_parent
from llmmed.training import memory
from llmmed.training.execution import prepare_backend, resolve_compile
from llmmed.training.micro_step import build_micro_step
from llmmed.training.step import Stepper

_SHARE = 0.92  # of the free memory; the rest is for other kernels than PyTorch's, evaluation and fragmentation


def main() -> None:
    end_with_parent()
    config = TypeAdapter(Config).validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.exit(0 if fits(config) else TOO_LARGE)


def fits(config: Config) -> bool:
    """Two whole steps, with PyTorch's kernels and in the mode of the run, on random tokens."""
    device = torch.device(config.device)
    limit = torch.cuda.mem_get_info(device)[0] * _SHARE
    prepare_backend(config)
    count = min(2, accumulation_steps(config.train))
    try:
        model = Transformer.for_training(config, load_kernels(default_choice()), device)
        stepper = Stepper(model, build_micro_step(model, config, resolve_compile(config)), config)
        shape = (config.train.micro_batch_size, config.train.seq_len + 1)
        for step in range(2):
            batches = [torch.randint(config.model.vocab_size, shape, device=device) for _ in range(count)]
            stepper.run(step, batches, count)
        torch.cuda.synchronize(device)
    except (RuntimeError, MemoryError) as error:
        if memory.is_out(error):
            return False
        raise
    return torch.cuda.max_memory_reserved(device) <= limit
