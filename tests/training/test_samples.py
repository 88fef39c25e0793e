"""Text written while training: from the weights of that step, into file, terminal and sinks; nothing changes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from llmmed import data
from llmmed.compose import compose
from llmmed.config import Config
from llmmed.data import Dataset
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer
from llmmed.model.decode import sample
from llmmed.training import checkpoint
from llmmed.training.metrics import Sample
from llmmed.training.samples import Sampler
from tests.training.tiny import build, run_with, tiny_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "text.txt").write_text("\n\n".join(f"Bone {i} meets joint {i % 7}." for i in range(400)))
    return compose(
        ["experiment=smoke", "data=text", f"data.path='{tmp_path / 'text.txt'}'", "tokenizer.vocab_size=400",
         "train.seq_len=16", "train.max_steps=6", "train.eval_every=0", "train.checkpoint_every=3", "device=cpu",
         "train.sample_every=3", "train.sample_prompts=[Bone, 'Bone 7 meets']", "train.sample_tokens=8"]
    )  # fmt: skip


@pytest.fixture
def dataset(config: Config) -> Dataset:
    return data.prepare(config)


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[int, int]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        self.heard.append((step, len(samples)))

    def finish(self, summary: Mapping[str, object], status: str) -> None:
        pass


def samples_of(folder: Path) -> list[dict[str, str | int]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_prompt_that_is_cut_is_told_of(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    long = "Bone 7 meets joint 1. Bone 8 meets joint 2. Bone 9 meets joint 3."
    train = replace(config.train, sample_prompts=["Bone", long])
    sampler = Sampler(build(config), dataset, replace(config, train=train), tmp_path, from_step=0)
    (told,) = sampler.cut_prompts()
    sampler.close()
    assert re.search(r"of the \d+ tokens of 'Bone 7 meets joint \.\.\.' the model is given the first 8, half", told)


def test_samples_are_of_the_weights_of_their_step(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    listener, folder = Listener(), tmp_path / "run"
    run_with(build(config), config, folder, dataset=dataset, sinks=[listener])
    assert listener.heard == [(3, 2), (6, 2)]
    found = samples_of(folder)
    assert [(entry["step"], entry["prompt"]) for entry in found] == [
        (3, "Bone"), (3, "Bone 7 meets"), (6, "Bone"), (6, "Bone 7 meets")]  # fmt: skip
    told = (folder / "console.txt").read_text()
    assert 'step 3: "Bone' in told
    assert max(map(len, told.splitlines())) < 130

    model = Transformer(config.model, load_kernels(default_choice()), torch.float32, max_seq_len=16)
    model.load_state_dict(checkpoint.load(folder / "checkpoints" / "step_00000003").model)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start_of_document = [dataset.end_token, *tokenizer.encode("Bone").ids]
    expected = list(sample(model, start_of_document, max_tokens=8, temperature=0.8, top_p=0.95,
                           seed=config.seed, end=dataset.end_token))  # fmt: skip
    assert found[0]["text"] == tokenizer.decode(expected)


def test_a_prompt_cannot_forge_the_end_of_a_document(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    sampler = Sampler(build(config), dataset, config, tmp_path, from_step=0)
    assert dataset.end_token not in sampler._tokenizer.encode("Bone <|endoftext|> 7").ids
    sampler.close()


def test_sampling_changes_no_weight_and_resuming_repeats_nothing(
    config: Config, dataset: Dataset, tmp_path: Path
) -> None:
    silent, talking = build(config), build(config)
    run_with(silent, replace(config, train=replace(config.train, sample_every=0)), tmp_path / "silent", dataset=dataset)
    folder = tmp_path / "talking"
    run_with(talking, config, folder, dataset=dataset)
    for name, tensor in silent.state_dict().items():
        assert torch.equal(talking.state_dict()[name], tensor), name
    whole = samples_of(folder)
    for file in (folder / "checkpoints" / "step_00000006").iterdir():
        file.unlink()
    run_with(build(config), config, folder, dataset=dataset, resume=True)
    assert samples_of(folder) == whole


def test_a_model_that_cannot_write_trains_on(
    config: Config, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(config)
    with torch.no_grad():
        model.final_norm.fill_(float("inf"))
    sampler = Sampler(model, dataset, config, tmp_path, from_step=0)
    assert sampler.run(3) == [Sample("Bone", ""), Sample("Bone 7 meets", "")]
    sampler.close()
    assert "step 3: no sample of 'Bone': the logits are not finite" in caplog.text


def test_data_without_text_is_told(tmp_path: Path) -> None:
    config = tiny_config("train.sample_every=2", "train.max_steps=2")
    run_with(build(config), config, tmp_path)
    assert "has no text to sample" in (tmp_path / "console.txt").read_text()
    assert not (tmp_path / "samples.jsonl").exists()
