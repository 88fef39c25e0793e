"""Writes a checkpoint as a folder that Hugging Face loads: config.json, model.safetensors and the tokenizer."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmmed.config import ModelConfig
from llmmed.data.tokenizer import end_of, write_settings
from llmmed.errors import UserError
from llmmed.files import read_json, write_json
from llmmed.model import hf_config_dict, to_hf_state_dict
from llmmed.training import checkpoint

TOKENIZER = "tokenizer.json"  # in the run folder


def main(arguments: Sequence[str]) -> int:
    """Exports, says where to, and returns the exit code."""
    try:
        if len(arguments) != 2:
            raise UserError("write: python scripts/export_hf.py <run folder> <target folder>")
        step = export_hf(Path(arguments[0]), Path(arguments[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, SafetensorError) as error:
        print(f"error: {arguments[1]} cannot be written: {error}; what is in it is not whole", file=sys.stderr)
        return 1
    print(f"step {step} of {arguments[0]} is in {arguments[1]}")
    return 0


def export_hf(run: Path, target: Path) -> int:
    """Exports the best checkpoint of a run, or its newest where the best is not kept. Returns the step.

    Raises:
        UserError: there is no whole checkpoint, or the target holds something else already.
    """
    found = best_or_newest(run)
    config = TypeAdapter(ModelConfig).validate_python(found.state["config"]["model"])
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; give a new folder")
    target.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in to_hf_state_dict(found.model, config).items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    token, end_id = end_of(run) if (run / TOKENIZER).exists() else (None, None)
    end = {"bos_token_id": end_id, "eos_token_id": end_id} if end_id is not None else {}
    seq_len = found.state["config"]["train"]["seq_len"]
    write_json(target / "config.json", hf_config_dict(config, max_seq_len=seq_len, dtype="float32", **end))
    if token is not None:
        shutil.copyfile(run / TOKENIZER, target / "tokenizer.json")
        write_settings(target, token, model_max_length=seq_len)
    return found.step


def best_or_newest(run: Path) -> checkpoint.Checkpoint:
    """The checkpoint with the best validation loss, or else the newest whole one. Raises `UserError` without one."""
    return checkpoint.load(find_best_or_newest(run))


def find_best_or_newest(run: Path) -> Path:
    """Where that checkpoint is; reads no tensors but for their checksums. Raises `UserError` without one."""
    newest = checkpoint.latest(run / "checkpoints")
    if newest is None:
        raise UserError(f"{run} has no whole checkpoint; give the folder of a run that wrote one")
    best = run / "checkpoints" / checkpoint.folder_name(read_json(newest / "state.json")["best"]["step"])
    return best if best != newest and best.exists() and checkpoint.damage(best) is None else newest
