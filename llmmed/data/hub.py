"""Datasets and tokenizers of the Hugging Face Hub, through `datasets` and `huggingface_hub`.

Errors of the network are tried again, with a pause that doubles; every other failure is one line.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmmed.config import DataConfig, TokenizerConfig
from llmmed.data.text import unpaired_surrogate
from llmmed.errors import UserError

if TYPE_CHECKING:
    import datasets

    from llmmed.data.spool import Position

Result = TypeVar("Result")
Report = Callable[[str], None]

_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp", "fsspec", "hf_xet"}
_LONGEST_PAUSE = 60.0


class HubSource:
    """The documents of a dataset, in its order. Raises `UserError`."""

    def __init__(self, config: DataConfig, report: Report) -> None:
        self._config, self._report = config, report
        self._rows = _retrying(lambda: _load(config), f"data.path={config.path}", config.retries, report)
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
                _handle(error, f"data.path={self._config.path}", next(failures), self._config.retries, self._report)

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
    found = [_retrying(functools.partial(_download, repository, name), what, retries, report) for name in names]
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


def _retrying(action: Callable[[], Result], what: str, retries: int, report: Report) -> Result:
    for failures in itertools.count(1):
        try:
            return action()
        except Exception as error:  # sorted by kind in the function called  # noqa: BLE001
            _handle(error, what, failures, retries, report)
    raise AssertionError("unreachable")


def _handle(error: Exception, what: str, failures: int, retries: int, report: Report) -> None:
    """Waits if it is worth trying again, else raises: a `UserError` for what the library's users can mend."""
    if isinstance(error, UserError):
        raise error
    reason = _first_line(error)
    if _is_network(error) and not _switched_off():
        if failures <= retries:
            pause = min(2.0 ** (failures - 1), _LONGEST_PAUSE)
            report(f"{what}: {reason}; trying again in {pause:g} s ({failures} of {retries})")
            time.sleep(pause)
            return
        raise UserError(
            f"{what}: the Hugging Face Hub does not answer ({reason}), after {failures} attempts; "
            f"look at the network and start again: what came is kept"
        ) from None
    raise _explained(error, what, reason) from None


def _explained(error: Exception, what: str, reason: str) -> Exception:
    if _switched_off() and (_is_network(error) or "offline" in reason.lower()):
        return UserError(f"{what}: it is not in the local cache, and HF_HUB_OFFLINE forbids the network")
    name, status = type(error).__name__, _status(error)
    if "gated" in reason.lower() or name == "GatedRepoError":
        return UserError(f"{what} is gated: ask for access on its page, then log in with hf auth login")
    if name in ("DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError") or status in (
        401,
        403,
        404,
    ):
        return UserError(f"{what}: there is no such thing on the Hugging Face Hub, or it is private ({reason})")
    if isinstance(error, (FileNotFoundError, ValueError)) or type(error).__module__.startswith("datasets"):
        return UserError(f"{what}: {reason}")
    return error


def _is_network(error: Exception) -> bool:
    """Whether this, or what it was raised from, may be gone at the next attempt. A server's answer decides first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    answers = [status for status in map(_status, chain) if status is not None]
    if answers:
        return any(status >= 500 or status in (408, 429) for status in answers)
    return any(
        isinstance(e, (ConnectionError, TimeoutError))
        or type(e).__module__.split(".")[0] in _CLIENTS
        or type(e).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled")
        for e in chain
    )


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _switched_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
