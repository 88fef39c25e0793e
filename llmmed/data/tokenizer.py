"""Tokenizers: byte-level byte-pair encoding trained here, or one from the Hugging Face Hub or a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmmed.errors import UserError
from llmmed.files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from llmmed.config import TokenizerConfig

END = "<|endoftext|>"
END_ID = 0  # the trainer numbers special tokens first
SETTINGS = "tokenizer_config.json"  # beside a tokenizer.json; says which token ends a document
_COMMON_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
_PIECE = 2**18  # characters
_BEFORE_A_WORD = re.compile(r"(?<=\S) (?=\S)")


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens: every byte, `END`, and the merges that the text has.

    Byte-pair encoding: Sennrich et al. 2016, on bytes as in GPT-2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for document in documents for piece in pieces(document)), trainer)
    return tokenizer


def write_settings(folder: Path, end: str, **others: int) -> None:
    """Says which token ends a document, as `transformers` reads it; a document also begins after that token."""
    special = {"bos_token": end, "eos_token": end}
    write_json(folder / SETTINGS, {"tokenizer_class": "PreTrainedTokenizerFast", **special, **others})


def end_of(folder: Path) -> tuple[str, int]:
    """The token that ends a document in the tokenizer of a run's folder, and its id. Raises `UserError`."""
    settings = folder / SETTINGS
    token = (_named_end(settings) if settings.exists() else None) or END
    end = read(folder / "tokenizer.json").token_to_id(token)
    if end is None:
        raise UserError(f"{folder / 'tokenizer.json'} has no token {token}, with which its documents are said to end")
    return token, end


def load(config: TokenizerConfig, retries: int, report: Callable[[str], None]) -> tuple[Tokenizer, int]:
    """The tokenizer of `tokenizer=hub` and the id of its end token. Raises `UserError`.

    The end token is the one that `tokenizer_config.json` names, or a common name that the vocabulary has.
    """
    from llmmed.data import hub

    file, settings_file = hub.tokenizer_files(config, retries, report)
    try:
        tokenizer = read(file)
    except Exception as error:  # noqa: BLE001 - the library raises nothing more exact
        raise UserError(f"tokenizer.path={config.path}: {file} is not a tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = _named_end(settings_file)
    for token in (named,) if named is not None else _COMMON_ENDS:
        if (end := tokenizer.token_to_id(token)) is not None:
            return tokenizer, end
    wanted = f"its end token {named}" if named else f"an end token: {', '.join(_COMMON_ENDS)}"
    raise UserError(f"tokenizer.path={config.path}: the vocabulary does not have {wanted}")


def read(file: Path) -> Tokenizer:
    """A tokenizer for text that may say anything: what is spelled like a special token is characters like any other."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Every id is below it, also where ids are missing in between."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def pieces(document: str) -> Iterator[str]:
    """A long document cut before words, where a byte-level tokenizer cuts anyway: it bounds what encoding holds."""
    start = 0
    while len(document) - start > _PIECE:
        found = _BEFORE_A_WORD.search(document, start + _PIECE, start + _PIECE + 2**14)
        end = found.start() if found else start + _PIECE
        yield document[start:end]
        start = end
    yield document[start:]


def _named_end(settings_file: Path | None) -> str | None:
    if settings_file is None:
        return None
    try:
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{settings_file}: not JSON ({error})") from None
    token = settings.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
