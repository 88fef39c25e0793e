"""An exported run has the same logits and tokens under Hugging Face."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from llmmed import data, generate
from llmmed.compose import compose
from llmmed.errors import UserError
from llmmed.export import export_hf
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer, decode
from llmmed.training import checkpoint
from tests.training.test_faults import can_mount
from tests.training.tiny import newest_checkpoint, run, run_with, tiny_config

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

    assert step == newest_checkpoint(tmp_path / "run").state["best"]["step"]
    model.load_state_dict(checkpoint.load(tmp_path / "run" / "checkpoints" / f"step_{step:08d}").model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    ids = tokenizer("Bone 12 meets joint 5.")["input_ids"]
    assert tokenizer.decode(ids) == "Bone 12 meets joint 5."
    assert tokenizer.eos_token_id == dataset.end_token
    tokens = torch.tensor([ids[:16]])
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces: unshare -Urm")
def test_a_full_disk_is_one_line(tmp_path: Path, repository: Path) -> None:
    run(tiny_config("train.max_steps=2"), tmp_path / "run")
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=40k tmpfs disk && "$@"'
    command = [sys.executable, str(repository / "scripts" / "export_hf.py"), "run", "disk/exported"]
    done = subprocess.run(
        ["unshare", "-Urm", "bash", "-c", script, "bash", *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: disk/exported cannot be written: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def run_on_text(folder: Path) -> data.Dataset:
    """A run of two steps, in `folder / "run"`."""
    (folder / "text.txt").write_text("\n\n".join(f"Bone {i} meets joint {i % 7}." for i in range(400)))
    config = compose(
        ["experiment=smoke", "data=text", f"data.path='{folder / 'text.txt'}'", "tokenizer.vocab_size=400",
         "train.seq_len=16", "train.max_steps=2", "train.eval_every=0", "device=cpu"]
    )  # fmt: skip
    model = Transformer.for_training(config, load_kernels(default_choice()), "cpu")
    dataset = data.prepare(config)
    run_with(model, config, folder / "run", dataset=dataset)
    return dataset


def test_a_prompt_begins_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the training's texts do, which stand behind the end of another; of 1 token there is room for all."""
    dataset, given = run_on_text(tmp_path), []

    def sample(model: Transformer, prompt: list[int], **how: Any) -> Iterator[int]:
        given.extend(prompt)
        return decode.sample(model, prompt, **how)

    monkeypatch.setattr(generate, "sample", sample)
    text = "".join(generate.generate(generate.Request(tmp_path / "run", "Bone 7", max_tokens=1, temperature=0)))
    assert text.startswith("Bone 7")
    assert given[0] == dataset.end_token
    assert Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json")).decode(given[1:]) == "Bone 7"


def test_whoever_reads_generated_text_may_stop(tmp_path: Path, repository: Path) -> None:
    run_on_text(tmp_path)
    command = shlex.join([sys.executable, str(repository / "scripts" / "generate.py"), "run", "prompt=Bone"])
    script = f"{command} | head -c 4; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Bone", "")


def test_a_run_without_checkpoints_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no whole checkpoint"):
        export_hf(tmp_path, tmp_path / "exported")
