"""Decoding with a cache gives the logits of the whole sequence, and greedy decoding the tokens of Hugging Face."""

from __future__ import annotations

import pytest
import torch

from llmmed.config import ModelConfig
from llmmed.kernels.base import Kernels
from llmmed.model import Transformer, hf_config_dict, to_hf_state_dict
from llmmed.model.decode import Decoder, _pick, sample


def build(config: ModelConfig, kernels: Kernels) -> Transformer:
    model = Transformer(config, kernels, torch.float32, max_seq_len=40, seed=3)
    for parameter in model.parameters():  # larger than at the start of a training, so that tokens differ
        parameter.data *= 4 if parameter.ndim == 2 else 1
    return model


def test_the_cache_changes_nothing(tiny: ModelConfig, kernels: Kernels) -> None:
    model = build(tiny, kernels)
    tokens = torch.randint(tiny.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)
    decoder = Decoder(model)
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 15), (15, 20)):
        found = decoder.advance(tokens[:, start:end])
        torch.testing.assert_close(found, expected[:, end - 1], rtol=1e-4, atol=1e-4)


def test_greedy_decoding_gives_the_tokens_of_transformers(tiny: ModelConfig, kernels: Kernels) -> None:
    transformers = pytest.importorskip("transformers")
    model = build(tiny, kernels)
    config = transformers.LlamaConfig(**hf_config_dict(tiny, max_seq_len=40))
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(to_hf_state_dict(model, tiny))
    prompt = [5, 17, 33]
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 3:].tolist()
    found = list(sample(model, prompt, max_tokens=25, temperature=0, top_p=1.0, seed=0, end=-1))
    assert found == expected
    assert len(set(found)) > 3


def test_a_seed_means_one_text_and_the_end_ends_it(tiny: ModelConfig, kernels: Kernels) -> None:
    model = build(tiny, kernels)

    def draw(seed: int, end: int = -1) -> list[int]:
        return list(sample(model, [1, 2], max_tokens=20, temperature=1.0, top_p=0.9, seed=seed, end=end))

    assert draw(0) == draw(0) != draw(1)
    first = draw(0)
    assert draw(0, end=first[4]) == first[: first.index(first[4])]


def test_the_nucleus_leaves_the_tail_out() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {_pick(logits, 1.0, 0.7, generator) for _ in range(200)}
    assert drawn == {0, 1}
    assert {_pick(logits, 1.0, 1.0, generator) for _ in range(400)} == {0, 1, 2, 3}
    assert _pick(logits, 1.0, 1e-50, generator) == 0  # as small as none in float32


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-6])
def test_the_coldest_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([-3.0, 80.0, 79.0])
    assert _pick(logits, temperature, 1.0, torch.Generator().manual_seed(0)) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(temperature: float, value: float) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        _pick(torch.tensor([0.0, value]), temperature, 1.0, torch.Generator())
