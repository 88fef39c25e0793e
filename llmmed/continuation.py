"""Whether a configuration can go on from a checkpoint that another one, or the same, has written."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmmed.compose import as_dict
from llmmed.config import Config
from llmmed.errors import UserError
from llmmed.files import read_json
from llmmed.run_folder import shown

_FIXED = ("model", "optimizer.name", "data.name", "data.weights", "data.validation_fraction", "data.max_documents",
          "tokenizer", "seed", "train.seq_len")  # fmt: skip
_FREE = ("model.name", "model.init_from", "train.resume", "train.micro_batch_size", "train.log_every",
         "train.profile_steps", "train.dry_run", "kernels", "logger", "device")  # fmt: skip


def stored_config(folder: Path) -> dict[str, Any] | None:
    """The configuration in the newest checkpoint of a run folder that has a readable one. Reads no tensors."""
    states = (folder / "checkpoints").glob("*step_*/state.json")  # one that was being replaced has a prefix
    for path in sorted(states, key=lambda path: path.parent.name[-8:], reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return dict(read_json(path)["config"])
    return None


def changes(folder: Path, config: Config) -> list[str]:
    """What the run of a folder goes on with that is not as its checkpoint was written, as `key: before -> now`.

    Raises:
        UserError: the checkpoint's tensors do not fit, or it is of other data as far as the configuration tells: of
            windows of another length, or in another order, nobody could say which have been trained on.
    """
    stored, wanted = stored_config(folder) or {}, as_dict(config)
    old, new = _flat(stored), _flat(wanted)
    found = [key for key in old if key in new and old[key] != new[key] and not _under(key, _FREE)]
    misfit = [f"{key}={old[key]} (here {new[key]})" for key in found if _under(key, _FIXED)]
    before, now = (", ".join(sorted(values.get("data", {}).get("sources", {}))) for values in (stored, wanted))
    if stored and before != now:
        misfit.append(f"data.sources={{{before}}} (here {{{now}}})")
    if misfit:
        told = ", ".join(misfit)
        raise UserError(
            f"the checkpoint in {shown(folder)} is of {told}; give what it was started with, or start a new run"
        )
    return [f"{key}: {old[key]} -> {new[key]}" for key in found]


def check_data(checkpoint: Path, fingerprint: str) -> None:
    """Raises `UserError` if a checkpoint was trained on other tokens than those with that fingerprint."""
    if read_json(checkpoint / "state.json")["data"] != fingerprint:
        raise UserError(
            f"the data is not that of {shown(checkpoint)}: the text, the tokenizer or what is taken of the text has "
            f"changed; start a new run"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def _under(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
