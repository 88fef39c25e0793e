"""Every shipped experiment runs: a few steps of it, on the CPU, from the command line to the last file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmmed.compose import compose, config_folder
from tests.processes import run_script

EXPERIMENTS = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))

# What makes any of them short; everything else is the experiment's own.
SHORT = ["device=cpu", "kernels=pytorch", "model.n_layers=2", "train.max_steps=2", "train.seq_len=32",
         "train.micro_batch_size=2", "train.eval_tokens=64", "train.log_every=1", "hydra.run.dir=run"]  # fmt: skip

# In place of what only the Hub has: tests need no network.
OFFLINE = ["data=synthetic", "tokenizer=bpe"]

# Of the text that is read, a part: a tokenizer is trained on it.
PART = ["data.max_documents=500"]

FILES = ["env.json", "kernels.json", "loss.png", "metrics.jsonl", "status.json", "summary.json", "train.log"]
SUMMARY = {"tokens_per_second", "mfu", "peak_memory_gib", "final/train_loss", "final/val_loss", "total_parameters",
           "training_time_seconds", "time_to_first_step_seconds", "kernels/rms_norm", "use_triton_rmsnorm",
           "kernels/rotary", "use_triton_rotary"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_few_steps_of_every_experiment(name: str, tmp_path: Path, repository: Path) -> None:
    config = compose([f"experiment={name}"])
    data = OFFLINE if "hub" in (config.data.name, config.tokenizer.name) else PART
    done = run_script(repository / "scripts" / "train.py", [f"experiment={name}", *SHORT, *data], tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert not [file for file in FILES if not (run / file).stat().st_size]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert set(json.loads((run / "summary.json").read_text())) >= SUMMARY
    assert (run / "checkpoints" / "step_00000002" / "model.safetensors").exists()
    assert str(run.name) in done.stdout
