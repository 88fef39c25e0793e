"""A mixture draws each source by its weight, forgets nothing, needs no state, and leaks nothing between sources."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from llmmed import data
from llmmed.compose import compose
from llmmed.config import Config
from llmmed.data.batches import Batches
from llmmed.data.mixture import BLOCK, Mixture
from llmmed.errors import UserError

A, B = np.arange(0, 801, dtype=np.uint16), np.arange(10_000, 10_161, dtype=np.uint16)  # 100 and 20 windows of 8


def batches(seed: int = 0, shuffle: bool = True, **weights: float) -> Batches:
    return Batches(Mixture({"a": A, "b": B}, weights or {"a": 3.0, "b": 1.0}), 8, 4, seed, shuffle)


def firsts(batch: torch.Tensor) -> list[int]:
    return [int(row[0]) for row in batch]


def mixed(folder: Path, *overrides: str) -> Config:
    sources = ["+data@data.sources.more=text", f"data.sources.more.path='{folder}/more.txt'", "+data.weights.more=1"]
    first = [f"data.sources.text.path='{folder}/text.txt'", "~data.sources.biomed", "~data.weights.biomed"]
    sizes = ["tokenizer.vocab_size=400", "train.seq_len=16"]
    return compose(["data=mixture", *first, *sources, *sizes, *overrides])


def test_a_batch_depends_on_seed_and_index_alone() -> None:
    first, second = batches(seed=3), batches(seed=3)
    expected = [first.get(i) for i in range(700)]
    for index in (699, 0, 250, 251):
        assert torch.equal(second.get(index), expected[index])
    assert any(not torch.equal(batches(seed=4).get(i), expected[i]) for i in range(3))


def test_every_block_has_the_shares_and_every_epoch_every_window() -> None:
    drawn = [start for i in range(2 * BLOCK // 4) for start in firsts(batches_of_two_blocks.get(i))]
    for block in (drawn[:BLOCK], drawn[BLOCK:]):
        assert sum(start < 10_000 for start in block) == BLOCK * 3 // 4
    counts = Counter(drawn)
    assert {counts[start] for start in range(0, 800, 8)} == {2 * 750 // 100}
    assert {counts[start] for start in range(10_000, 10_160, 8)} == {2 * 250 // 20}


batches_of_two_blocks = batches()


def test_inputs_and_targets_are_one_window_of_one_source() -> None:
    for index in range(50):
        batch = batches().get(index)
        assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)


def test_without_shuffling_each_source_is_in_the_order_of_its_text() -> None:
    drawn = [start for i in range(20) for start in firsts(batches(shuffle=False).get(i))]
    assert [s for s in drawn if s < 10_000][:20] == list(range(0, 160, 8))
    assert [s for s in drawn if s >= 10_000][:10] == list(range(10_000, 10_080, 8))


def test_a_weight_too_small_to_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.weights\.b=0\.0001 is less than"):
        batches(a=1.0, b=0.0001)


def test_sources_are_prepared_with_one_tokenizer_and_nothing_leaks(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    shared = [f"Term {i}. The organ number {i} lies beside it." for i in range(300)]
    (tmp_path / "text.txt").write_text("\n\n".join(shared))
    others = [f"Note {i}. Nothing but a note about {i * i}." for i in range(100)]
    (tmp_path / "more.txt").write_text("\n\n".join([*shared, *others]))
    dataset = data.prepare(mixed(tmp_path, "data.weights.more=2"))
    assert isinstance(dataset.train, Mixture)
    assert isinstance(dataset.validation, Mixture)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_file))

    def documents(part: Mixture) -> dict[str, set[str]]:
        texts = {key: tokenizer.decode(tokens, skip_special_tokens=False) for key, tokens in part.parts.items()}
        return {key: set(text.split("<|endoftext|>")) - {""} for key, text in texts.items()}

    train, validation = documents(dataset.train), documents(dataset.validation)
    assert not set.union(*train.values()) & set.union(*validation.values())
    assert validation["text"] - validation["more"], "the sources are split alike, so that this shows nothing"
    assert train["text"] | validation["text"] | validation["more"] >= set(shared)
    assert set(others) <= train["more"] | validation["more"]
    assert len(dataset.train) == sum(map(len, dataset.train.parts.values()))
    assert dataset.train_documents == sum(map(len, train.values()))
    assert dataset.bytes_per_token is not None
    assert 1 < dataset.bytes_per_token < 10

    def cached(message: str) -> None:
        pytest.fail(f"it is not taken from the cache: {message}")

    again = data.prepare(mixed(tmp_path, "data.weights.more=2"), cached)
    assert again.fingerprint == dataset.fingerprint
    reweighted = data.prepare(mixed(tmp_path, "data.weights.more=5"), cached)
    assert reweighted.fingerprint != dataset.fingerprint


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+data.weights.pubmed=1"], ["needs a weight for each source", "pubmed"]),
        (["~data.weights.more"], ["needs a weight for each source"]),
        (["data.weights.more=0"], ["data.weights.more"]),
        (["data.weights.more=1e-9"], ["data.weights.more", "would never be drawn"]),
        (["+data@data.sources.random=synthetic", "+data.weights.random=1"], ["data.sources.random", "synthetic"]),
        (["data.sources.more.path=/no/such/file.txt"], ["/no/such/file.txt"]),
        (["+data@data.sources.web=hub", "+data.weights.web=1"], ["data.sources.web needs data.sources.web.path="]),
    ],
)
def test_a_mistake_is_told(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    for name in ("text", "more"):
        (tmp_path / f"{name}.txt").write_text("The liver makes bile. " * 50)
    with pytest.raises(UserError) as caught:
        mixed(tmp_path, *overrides)
    for word in words:
        assert word in str(caught.value)
