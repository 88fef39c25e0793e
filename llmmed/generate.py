"""The command behind `scripts/generate.py`: streams a continuation of a prompt to the terminal."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter
from tokenizers import Tokenizer

from llmmed.config import ModelConfig
from llmmed.data.tokenizer import end_of
from llmmed.data.tokenizer import read as read_tokenizer
from llmmed.errors import UserError
from llmmed.export import TOKENIZER, best_or_newest
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer
from llmmed.model.decode import sample

_MOST_TOKENS = 100_000  # the tables of the positions are made for all of them


@dataclass(frozen=True)
class Request:
    """What to generate."""

    run: Path
    prompt: str = ""
    max_tokens: int = 80
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


def main(arguments: Sequence[str]) -> int:
    """Generates, and returns the exit code."""
    try:
        for piece in generate(parse(arguments)):
            print(piece, end="", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # whoever read it has enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        return 0
    print()
    return 0


def parse(arguments: Sequence[str]) -> Request:
    """`<run folder> key=value ...`. Raises `UserError`."""
    if not arguments or ("=" in arguments[0] and not Path(arguments[0]).exists()):
        raise UserError('write: python scripts/generate.py <run folder> prompt="Pneumonia."')
    request = Request(Path(arguments[0]))
    for argument in arguments[1:]:
        key, equals, value = argument.partition("=")
        kind = {"prompt": str, "max_tokens": int, "temperature": float, "top_p": float, "seed": int}.get(key)
        if kind is None or not equals:
            raise UserError(f"'{argument}': the keys are prompt, max_tokens, temperature, top_p and seed")
        try:
            request = replace(request, **{key: kind(value)})
        except ValueError:
            raise UserError(f"{argument}: not a number") from None
    if not 1 <= request.max_tokens <= _MOST_TOKENS:
        raise UserError(f"max_tokens={request.max_tokens}: from 1 to {_MOST_TOKENS}")
    if not 0 <= request.temperature < math.inf or not 0 < request.top_p <= 1:
        raise UserError("temperature is 0 or more, and finite; top_p above 0 and at most 1")
    if not 0 <= request.seed < 2**63:
        raise UserError(f"seed={request.seed}: from 0 to 2^63 - 1")
    try:
        request.prompt.encode()
    except UnicodeEncodeError:  # arguments are decoded by the locale
        raise UserError("the prompt is not valid UTF-8") from None
    return request


def generate(request: Request) -> Iterator[str]:
    """The prompt, then pieces of text as they come. Raises `UserError`."""
    tokenizer_file = request.run / TOKENIZER
    if not tokenizer_file.exists():
        raise UserError(f"{request.run} has no {TOKENIZER}; give the folder of a run on text")
    found = best_or_newest(request.run)
    tokenizer = read_tokenizer(tokenizer_file)
    config = TypeAdapter(ModelConfig).validate_python(found.state["config"]["model"])
    _, end = end_of(request.run)
    # A document begins after the end of another: without it the model would continue the middle of one.
    prompt = [end, *tokenizer.encode(request.prompt, add_special_tokens=False).ids]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = load_kernels(default_choice())
    length = len(prompt) + request.max_tokens
    model = Transformer(config, kernels, torch.float32, max_seq_len=length, seed=None, device=device)
    model.load_state_dict(found.model)
    tokens = sample(
        model,
        prompt,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        end=end,
    )
    yield request.prompt
    try:
        yield from _pieces(tokenizer, tokens)
    except FloatingPointError as error:
        raise UserError(f"step {found.step} of {request.run} cannot write: {error}; its training diverged") from error


def _pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text as far as it is certain: a character may be made of several tokens."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
