"""Datasets and tokenizers of the Hugging Face Hub, through `datasets` and `huggingface_hub`.

`network` tries again what failed on the way; every other failure is one line.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmmed.config import DataConfig, TokenizerConfig
from llmmed.data import network
from llmmed.data.network import Report
from llmmed.data.text import unpaired_surrogate
from llmmed.errors import UserError

if TYPE_CHECKING:
    import datasets

    from llmmed.data.spool import Position


class HubSource:
    """The documents of a dataset, in its order. Raises `UserError`."""

    def __init__(self, config: DataConfig, report: Report) -> None:
        self._config, self._report = config, report
        local = Path(config.path or "").exists()
        self._rows = network.fetch(lambda: _load(config), f"data.path={config.path}", config.retries, report, local)
        self._check_field(self._rows.column_names)
        self._state: Position = {"row": 0}
        self._since = 0  # rows after `_state`
        self._beginning = self._state = self._position()

    def documents(self, start: Position | None) -> Iterator[str]:
        self._state, self._since = start or self._beginning, 0
        failures = itertools.count(1)
        while True:
            try:
                for row in self._rows_after(self._state, self._since):
                    self._since += 1
                    failures = itertools.count(1)
                    text = self._text(row)
                    if text is not None:
                        yield text
                return
            except Exception as error:  # sorted by kind in the function called  # noqa: BLE001
                network.wait_or_raise(
                    error, f"data.path={self._config.path}", next(failures), self._config.retries, self._report
                )

    def position(self) -> Position:
        self._state = self._position()
        self._since = 0
        return self._state

    def _position(self) -> Position:
        import datasets

        if isinstance(self._rows, datasets.IterableDataset):
            state: Position = self._rows.state_dict()
            return state
        return {"row": self._state["row"] + self._since}

    def _rows_after(self, state: Position, skipped: int) -> Iterator[dict[str, Any]]:
        import datasets

        rows = self._rows
        if isinstance(rows, datasets.IterableDataset):
            rows.load_state_dict(state)
            return itertools.islice(rows, skipped, None)
        return iter(rows.select(range(state["row"] + skipped, len(rows))))

    def _text(self, row: dict[str, Any]) -> str | None:
        field, name = self._config.text_field, f"data.path={self._config.path}"
        if field not in row:
            self._check_field(list(row))
        text = row[field]
        if text is None:
            return None
        if not isinstance(text, str):
            raise UserError(f"{name}: field '{field}' holds {type(text).__name__}, not text; set data.text_field")
        if half := unpaired_surrogate(text):
            raise UserError(
                f"{name}: a text has {half}, half of a surrogate pair, which is no character: {text[:40]!r}"
            )
        return text

    def _check_field(self, names: list[str] | None) -> None:
        if names is not None and self._config.text_field not in names:
            raise UserError(
                f"data.path={self._config.path} has no field '{self._config.text_field}'; "
                f"set data.text_field to one of {', '.join(names)}"
            )


def tokenizer_files(config: TokenizerConfig, retries: int, report: Report) -> tuple[Path, Path | None]:
    """`tokenizer.json` and, if there is one, `tokenizer_config.json`, of a folder or a repository."""
    if config.path is None:
        raise UserError("tokenizer=hub needs tokenizer.path=<a repository's name, or a folder with its tokenizer.json>")
    names = ("tokenizer.json", "tokenizer_config.json")
    if Path(config.path).is_dir():
        main, settings = (Path(config.path) / name for name in names)
        if not main.is_file():
            raise UserError(f"tokenizer.path={config.path}: the folder has no tokenizer.json")
        return main, settings if settings.is_file() else None
    repository, what = config.path, f"tokenizer.path={config.path}"
    found = [network.fetch(functools.partial(_download, repository, name), what, retries, report) for name in names]
    if found[0] is None:
        raise UserError(f"{what}: the repository has no tokenizer.json")
    return found[0], found[1]


def _download(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError:  # the network, not the repository
        raise
    except EntryNotFoundError:
        return None


def _load(config: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    # Retrying is done here, where it is told and ends.
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
    return datasets.load_dataset(
        config.path, config.subset, split=config.split, revision=config.revision, streaming=config.streaming
    )
