"""A training begins with the weights of a Hugging Face Llama or of a run of ours, or says what does not fit."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmmed import init_from
from llmmed.compose import compose
from llmmed.config import Config
from llmmed.errors import UserError
from llmmed.export import export_hf
from llmmed.files import write_json
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer
from llmmed.model.decode import sample
from llmmed.run import run as run_everything
from llmmed.training import checkpoint
from tests.training.tiny import TINY, newest_checkpoint, run, tiny_config

transformers = pytest.importorskip("transformers")

SMOL = ["model.n_layers=3", "model.d_model=144", "model.n_heads=9", "model.n_kv_heads=3", "model.d_ff=384",
        "model.vocab_size=320", "model.rope_theta=100000.0", "model.norm_eps=1e-5",
        "model.tie_embeddings=true"]  # fmt: skip


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM's proportions, as `transformers` itself writes them, in several files."""
    folder = tmp_path_factory.mktemp("smol")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=320, hidden_size=144, intermediate_size=384, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, rms_norm_eps=1e-5,
        tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.rand_like(parameter) + 0.5 if parameter.ndim == 1 else torch.randn_like(parameter) / 12
            parameter.copy_(spread)
    model.save_pretrained(folder, max_shard_size="400KB")
    return folder


def smol_config(folder: Path | str, *overrides: str) -> Config:
    return compose([*TINY, *SMOL, f"model.init_from='{folder}'", *overrides])


def begin(config: Config) -> Transformer:
    found = init_from.find(config.model)
    assert found is not None
    model = Transformer.for_training(config, load_kernels(default_choice()), "cpu")
    model.load_state_dict(found.load(config.model))
    return model


def hugging_face(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_sharded_llama_gives_the_logits_and_the_text_of_transformers(smol: Path) -> None:
    assert len(list(smol.glob("*.safetensors"))) > 1
    model, theirs = begin(smol_config(smol, "train.seq_len=48")), hugging_face(smol)
    tokens = torch.randint(320, (2, 48), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    prompt = tokens[0, :5].tolist()
    with torch.no_grad():
        text = theirs.generate(
            tokens[:1, :5], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )  # fmt: skip
    found = list(sample(model, prompt, max_tokens=30, temperature=0, top_p=1.0, seed=0, end=-1))
    assert found == text[0, 5:].tolist()


def test_export_and_back(tmp_path: Path) -> None:
    model, _ = run(tiny_config("train.max_steps=3"), tmp_path / "run")
    step = export_hf(tmp_path / "run", tmp_path / "exported")
    places = {
        "exported": tmp_path / "exported",
        "run": tmp_path / "run",
        "checkpoint": tmp_path / "run" / "checkpoints" / checkpoint.folder_name(step),
    }
    for name, place in places.items():
        config = tiny_config(f"model.init_from='{place}'")
        for key, tensor in begin(config).state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key]), (name, key)


def test_finding_a_run_s_checkpoint_loads_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("train.max_steps=4", "train.checkpoint_every=2")
    run(config, tmp_path)

    def loads(*_: object) -> None:
        pytest.fail("tensors are loaded")

    monkeypatch.setattr(checkpoint, "load_file", loads)
    found = init_from.find(tiny_config(f"model.init_from='{tmp_path}'").model)
    assert found is not None
    assert found.folder == tmp_path / "checkpoints" / "step_00000004"
    assert found.is_checkpoint


def test_another_architecture_is_told_with_the_overrides_that_fit(smol: Path) -> None:
    with pytest.raises(UserError, match=r"n_layers 3 \(here 2\)") as caught:
        init_from.find(tiny_config(f"model.init_from='{smol}'").model)
    overrides = re.findall(r"model\.(?!init_from)\w+=\S+", str(caught.value))
    assert len(overrides) > 5
    config = tiny_config(f"model.init_from='{smol}'", *overrides)
    assert begin(config)(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 320)


def damaged(smol: Path, folder: Path, what: str) -> Path:
    shutil.copytree(smol, folder)
    shards = sorted(folder.glob("*.safetensors"))
    if what == "missing":
        shards[0].unlink()
    elif what == "truncated":
        shards[0].write_bytes(shards[0].read_bytes()[:-100])
    elif what == "no weights":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [("missing", "names model-00001-of"), ("truncated", "model.init_from="), ("no weights", "only safetensors")],
)
def test_damaged_weights_are_told(smol: Path, tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        begin(smol_config(damaged(smol, tmp_path / "copy", what)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-folder", "no such folder, and it is no hub name"),
        ("nobody/nothing", "not in the local cache, and HF_HUB_OFFLINE forbids the network"),
        (".", "neither a Hugging Face folder"),
    ],
)
def test_what_is_not_there_is_told(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        init_from.find(smol_config(name).model)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_warned_of(smol: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(smol, tmp_path / "with")
    write_json(tmp_path / "with" / "tokenizer.json", {"model": {"vocab": {"a": 0}}})
    found = init_from.find(smol_config(tmp_path / "with").model)
    assert found is not None
    for vocabulary, warnings in (({"a": 0}, 0), ({"b": 0}, 1)):
        write_json(tmp_path / "data.json", {"model": {"vocab": vocabulary}})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            init_from.warn_of_other_tokenizer(found, tmp_path / "data.json")
        assert len(caplog.records) == warnings


def weights(folder: Path) -> dict[str, Tensor]:
    return newest_checkpoint(folder).model


def test_a_run_begins_with_them_and_a_resumed_run_does_not_ask_for_them(smol: Path, tmp_path: Path) -> None:
    initial, folder = tmp_path / "initial", tmp_path / "run"
    shutil.copytree(smol, initial)
    folder.mkdir()
    options = ["kernels=pytorch", "optimizer.lr=1e-12", "optimizer.warmup_steps=0"]
    shared = ["tokenizer.vocab_size=300", *options]
    assert run_everything(smol_config(initial, *shared, "train.max_steps=2"), folder, started=0.0) == 0
    theirs = begin(smol_config(initial)).state_dict()
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-8, rtol=1e-6, msg=name)
    shutil.rmtree(initial)
    resumed = smol_config(initial, *shared, "train.max_steps=4", "train.resume=auto")
    assert run_everything(resumed, folder, started=0.0) == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4
