"""The same weights give the same logits and gradients as `LlamaForCausalLM`, in both directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmmed.config import ModelConfig
from llmmed.errors import UserError
from llmmed.kernels.base import Kernels
from llmmed.model import Transformer, from_hf_config_dict, from_hf_state_dict, hf_config_dict, to_hf_state_dict

transformers = pytest.importorskip("transformers")

SEQ = 48


@pytest.fixture(params=["tiny", "smol"])
def config(request: pytest.FixtureRequest, tiny: ModelConfig) -> ModelConfig:
    """`smol` has SmolLM's proportions: nine query heads on three, a tied table, a rotary base of 100,000."""
    smol = replace(
        tiny,
        name="smol",
        n_layers=3,
        d_model=144,
        n_heads=9,
        n_kv_heads=3,
        d_ff=384,
        rope_theta=1e5,
        tie_embeddings=True,
    )
    return {"tiny": tiny, "smol": smol}[request.param]


def hf_model(config: ModelConfig, seed: int) -> Any:
    """With weights that leave nothing near its neutral value: norms unlike one, logits unlike flat."""
    torch.manual_seed(seed)
    settings = transformers.LlamaConfig(**hf_config_dict(config, max_seq_len=SEQ), attn_implementation="eager")
    model = transformers.LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.rand_like(parameter) + 0.5 if parameter.ndim == 1 else torch.randn_like(parameter) / 12
            )
    return model


def our_model(config: ModelConfig, kernels: Kernels, state: dict[str, Tensor]) -> Transformer:
    model = Transformer(config, kernels, torch.float32, max_seq_len=SEQ)
    model.load_state_dict(from_hf_state_dict(state, config))
    return model


def draw_tokens(config: ModelConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(5))


def test_logits_and_gradients_are_hugging_faces(config: ModelConfig, kernels: Kernels) -> None:
    theirs = hf_model(config, seed=0)
    ours = our_model(config, kernels, theirs.state_dict())
    tokens = draw_tokens(config)
    expected = theirs(tokens, labels=tokens)
    logits = ours(tokens)
    assert expected.logits.std() > 0.3
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)

    targets = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), dim=1)
    loss = ours(tokens, targets)
    torch.testing.assert_close(loss, expected.loss, atol=1e-6, rtol=1e-6)
    loss.backward()
    expected.loss.backward()
    found = to_hf_state_dict({name: parameter.grad for name, parameter in ours.named_parameters()}, config)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_our_weights_load_into_hugging_face_from_a_file(config: ModelConfig, kernels: Kernels, tmp_path: Path) -> None:
    ours = Transformer(config, kernels, torch.float32, max_seq_len=SEQ, seed=3)
    save_file(to_hf_state_dict(ours, config), tmp_path / "model.safetensors", metadata={"format": "pt"})
    transformers.LlamaConfig(**hf_config_dict(config, max_seq_len=SEQ)).save_pretrained(tmp_path)
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    tokens = draw_tokens(config)
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-5, rtol=1e-5)
    back = from_hf_state_dict(load_file(tmp_path / "model.safetensors"), config)
    state = ours.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_configuration_survives_both_ways(config: ModelConfig) -> None:
    fields = hf_config_dict(config, max_seq_len=SEQ, eos_token_id=7)
    settings = transformers.LlamaConfig(**fields)
    assert settings.rope_parameters["rope_theta"] == config.rope_theta
    assert settings.eos_token_id == 7
    assert from_hf_config_dict(settings.to_dict(), name=config.name) == config
    old = {key: value for key, value in fields.items() if key != "rope_parameters"}
    assert from_hf_config_dict(old, name=config.name) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, "model_type='qwen3'; only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"head_dim": 24}, "head_dim=24; only 16"),
        ({"attention_bias": True}, "attention_bias=True; only False"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type='llama3'; only 'default'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads=0; it is an integer above 0"),
        ({"hidden_size": "64"}, "hidden_size='64'; it is an integer above 0"),
    ],
)
def test_a_configuration_that_the_model_cannot_follow_is_refused(
    tiny: ModelConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        from_hf_config_dict({**hf_config_dict(tiny, max_seq_len=SEQ), **change}, name="tiny")


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(UserError, match=r"config\.json is no JSON object"):
        from_hf_config_dict([], name="tiny")  # type: ignore[arg-type]


def test_weights_that_do_not_fit_are_refused(tiny: ModelConfig) -> None:
    state = hf_model(tiny, seed=0).state_dict()
    with pytest.raises(UserError, match=r"lacks model.layers.2.input_layernorm.weight, .* \.\.\.; check n_layers"):
        from_hf_state_dict(state, replace(tiny, n_layers=3))
    with pytest.raises(UserError, match=r"has besides model.layers.1"):
        from_hf_state_dict(state, replace(tiny, n_layers=1))
    with pytest.raises(UserError, match=r"mlp.gate_proj.weight is \(96, 64\), expected \(90, 64\)"):
        from_hf_state_dict(state, replace(tiny, d_ff=90))
    with pytest.raises(UserError, match=r"differs from its embedding table; set model.tie_embeddings=false"):
        from_hf_state_dict(state, replace(tiny, tie_embeddings=True))


def test_old_rotary_buffers_are_passed_over(tiny: ModelConfig) -> None:
    state = hf_model(tiny, seed=0).state_dict()
    extended = {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert from_hf_state_dict(extended, tiny).keys() == from_hf_state_dict(state, tiny).keys()
