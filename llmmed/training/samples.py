"""What the model writes while it learns: continuations of fixed prompts, into `samples.jsonl`."""

from __future__ import annotations

import logging
from pathlib import Path
from textwrap import shorten

import torch

from llmmed.config import Config
from llmmed.data import Dataset
from llmmed.data.tokenizer import read as read_tokenizer
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer
from llmmed.model.decode import sample
from llmmed.training.metrics import JsonLines, Sample

logger = logging.getLogger(__name__)

_TEMPERATURE, _TOP_P = 0.8, 0.95
_SHOWN = 100  # characters, in the line on the terminal


class Sampler:
    """Continues `train.sample_prompts` with the weights as they are. Changes nothing that the training depends on.

    Args:
        model: The one in training. The text is written with PyTorch's kernels, which take any length.
        dataset: Its tokenizer is used; there must be one.
        config: The run's.
        folder: The run folder. Samples after `from_step` belong to a run that was cut off and are removed,
            and those of it if they are still `owed`.
    """

    def __init__(
        self, model: Transformer, dataset: Dataset, config: Config, folder: Path, from_step: int, *, owed: bool = False
    ) -> None:
        self._model, self._train, self._seed, self._end = model, config.train, config.seed, dataset.end_token
        assert dataset.tokenizer_file is not None
        self._tokenizer = read_tokenizer(dataset.tokenizer_file)
        self._kernels = load_kernels(default_choice())
        self._file = JsonLines(folder / "samples.jsonl", from_step, owed=owed)

    def run(self, step: int) -> list[Sample]:
        """One sample a prompt, the same draw at every step, kept in the file."""
        samples = [Sample(prompt, self._continue(prompt, step)) for prompt in self._train.sample_prompts]
        for found in samples:
            self._file.write(step, {"prompt": found.prompt, "text": found.text})
        return samples

    def cut_prompts(self) -> list[str]:
        """A line for each prompt that the model is not given as a whole."""
        most = self._train.seq_len // 2
        lengths = {prompt: len(self._ids(prompt)) for prompt in self._train.sample_prompts}
        return [
            f"train.sample_prompts: of the {length} tokens of {shorten(prompt, 24, placeholder=' ...')!r} the model is "
            f"given the first {most}, half of train.seq_len"
            for prompt, length in lengths.items()
            if length > most
        ]

    def close(self) -> None:
        self._file.close()

    def _ids(self, prompt: str) -> list[int]:
        return list(self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def _continue(self, prompt: str, step: int) -> str:
        """Nothing where the model cannot write: that is no reason to end its training."""
        room = self._train.seq_len
        # A document begins after the end of another: without it the model would continue the middle of one.
        tokens = [self._end, *self._ids(prompt)[: room // 2]]
        count = min(self._train.sample_tokens, room - len(tokens))
        with torch.no_grad():
            found = sample(
                self._model, tokens, max_tokens=count, temperature=_TEMPERATURE, top_p=_TOP_P, seed=self._seed,
                end=self._end, kernels=self._kernels,
            )  # fmt: skip
            try:
                return str(self._tokenizer.decode(list(found)))
            except FloatingPointError as error:
                logger.warning("step %d: no sample of %r: %s; see the loss and train.precision", step, prompt, error)
                return ""


def one_line(samples: list[Sample]) -> str:
    """The first sample as one short line."""
    text = " ".join(f"{samples[0].prompt}{samples[0].text}".split())
    return f'"{text}"' if len(text) <= _SHOWN else f'"{text[:_SHOWN]} ..."'
