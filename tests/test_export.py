"""An exported run has the same logits and tokens under Hugging Face."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmmed import data
from llmmed.compose import compose
from llmmed.errors import UserError
from llmmed.export import export_hf
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer
from llmmed.training import checkpoint
from tests.training.tiny import run_with

transformers = pytest.importorskip("transformers")


def test_logits_and_tokens_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"Bone {i} meets joint {i % 7}." for i in range(400)))
    config = compose(
        ["experiment=smoke", "data=text", f"data.path='{tmp_path / 'text.txt'}'", "tokenizer.vocab_size=400",
         "train.seq_len=16", "train.max_steps=6", "train.eval_every=2", "model.n_kv_heads=2", "device=cpu"]
    )  # fmt: skip
    dataset = data.prepare(config)
    kernels = load_kernels(default_choice())
    model = Transformer(config.model, kernels, torch.float32, max_seq_len=16)
    run_with(model, config, tmp_path / "run", dataset=dataset)
    step = export_hf(tmp_path / "run", tmp_path / "exported")

    newest = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert step == newest.state["best"]["step"]
    model.load_state_dict(checkpoint.load(tmp_path / "run" / "checkpoints" / f"step_{step:08d}").model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    ids = tokenizer("Bone 12 meets joint 5.")["input_ids"]
    assert tokenizer.decode(ids) == "Bone 12 meets joint 5."
    assert tokenizer.eos_token_id == dataset.end_token
    tokens = torch.tensor([ids[:16]])
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_run_without_checkpoints_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no whole checkpoint"):
        export_hf(tmp_path, tmp_path / "exported")
