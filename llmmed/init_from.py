"""`model.init_from`: the weights that a training begins with, from a Hugging Face Llama or from a run of ours.

Only safetensors and JSON are read, so a folder may come from a stranger.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmmed.config import ModelConfig
from llmmed.data import network
from llmmed.errors import UserError
from llmmed.export import TOKENIZER, find_best_or_newest
from llmmed.files import read_json
from llmmed.model import from_hf_config_dict, from_hf_state_dict
from llmmed.training import checkpoint

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_RETRIES = 6  # as data.retries
_NOT_SHAPE = ("name", "init_from")  # fields of ModelConfig that do not decide what the weights mean


@dataclass(frozen=True)
class InitialWeights:
    """Weights of the model's own architecture. `find` makes one; nothing big is read before `load`."""

    name: str  # as it stands in model.init_from
    folder: Path
    is_checkpoint: bool  # ours; otherwise Hugging Face's
    tokenizer_file: Path | None

    def load(self, config: ModelConfig) -> dict[str, Tensor]:
        """Under the names of `Transformer`, on the CPU. Raises `UserError` if a file is missing, damaged or misfit."""
        try:
            if self.is_checkpoint:
                return load_file(self.folder / _WEIGHTS)
            files = _weight_files(self.folder)
            state = {name: tensor for file in files for name, tensor in load_file(file).items()}
            return from_hf_state_dict(state, config)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"model.init_from={self.name}: the weights cannot be read: {error}") from error


def find(config: ModelConfig) -> InitialWeights | None:
    """What `model.init_from` names, or None for null. A hub name is downloaded, once.

    Raises:
        UserError: there is nothing, or its architecture is another; the message has the overrides that make it fit.
    """
    if config.init_from is None:
        return None
    found = _locate(config.init_from)
    try:
        _check_architecture(found, _architecture(found), config)
        if not found.is_checkpoint:
            _weight_files(found.folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.init_from={found.name}: its configuration cannot be read: {error}") from error
    return found


def warn_of_other_tokenizer(found: InitialWeights, tokenizer_file: Path | None) -> None:
    """One warning if the weights were trained on other tokens than those of the data."""
    if found.tokenizer_file is None or tokenizer_file is None:
        return
    theirs, ours = (read_json(path).get("model", {}).get("vocab") for path in (found.tokenizer_file, tokenizer_file))
    if theirs != ours:
        logger.warning(
            "model.init_from=%s was trained with another tokenizer than the data's: its embeddings stand for other "
            "tokens and have to be learned anew",
            found.name,
        )


def _locate(name: str) -> InitialWeights:
    folder = Path(name)
    if not folder.exists():
        if not _HUB_NAME.fullmatch(name):
            raise UserError(f"model.init_from={name}: there is no such folder, and it is no hub name (owner/model)")
        return _hugging_face(name, _download(name))
    if (folder / "config.json").exists():
        return _hugging_face(name, folder)
    if (folder / "state.json").exists():
        problem = checkpoint.damage(folder)
        if problem is not None:
            raise UserError(f"model.init_from={name}: the checkpoint is damaged: {problem}")
        return _ours(name, folder)
    if (folder / "checkpoints").is_dir():
        return _ours(name, find_best_or_newest(folder))
    raise UserError(
        f"model.init_from={name}: that is neither a Hugging Face folder with a config.json, nor a run, nor a checkpoint"
    )


def _hugging_face(name: str, folder: Path) -> InitialWeights:
    tokenizer = folder / TOKENIZER
    return InitialWeights(name, folder, False, tokenizer if tokenizer.exists() else None)


def _ours(name: str, folder: Path) -> InitialWeights:
    tokenizer = folder.parent.parent / TOKENIZER
    return InitialWeights(name, folder, True, tokenizer if tokenizer.exists() else None)


def _download(name: str) -> Path:
    """A snapshot of a hub model's configuration, weights and tokenizer, from the hub's cache if it is there."""
    from huggingface_hub import snapshot_download

    wanted = ["config.json", TOKENIZER, "*.safetensors", _INDEX]
    return network.fetch(
        lambda: Path(snapshot_download(name, allow_patterns=wanted)),
        f"model.init_from={name}",
        _RETRIES,
        logger.warning,
    )


def _architecture(found: InitialWeights) -> ModelConfig:
    if not found.is_checkpoint:
        return from_hf_config_dict(read_json(found.folder / "config.json"), name=found.name)
    stored = read_json(found.folder / "state.json")["config"]["model"]
    try:
        return TypeAdapter(ModelConfig).validate_python(stored)
    except ValidationError as error:
        raise UserError(f"model.init_from={found.name}: its configuration is not that of a run: {error}") from error


def _check_architecture(found: InitialWeights, theirs: ModelConfig, ours: ModelConfig) -> None:
    names = [field.name for field in fields(ModelConfig) if field.name not in _NOT_SHAPE]
    different = {name: (getattr(theirs, name), getattr(ours, name)) for name in names}
    different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
    if not different:
        return
    told = ", ".join(f"{name} {its} (here {own})" for name, (its, own) in different.items())
    overrides = " ".join(f"model.{name}={json.dumps(its)}" for name, (its, _) in different.items())
    raise UserError(f"model.init_from={found.name} is another architecture: {told}; add {overrides}")


def _weight_files(folder: Path) -> list[Path]:
    """The files with a Hugging Face model's tensors: one, or several with an index. Raises `UserError`."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).exists():
        raise UserError(f"model.init_from: {folder} has no {_WEIGHTS} and no {_INDEX}; only safetensors are read")
    files = [folder / name for name in sorted(set(read_json(folder / _INDEX)["weight_map"].values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"model.init_from: {folder / _INDEX} names {', '.join(missing)}, which is not there")
    return files
