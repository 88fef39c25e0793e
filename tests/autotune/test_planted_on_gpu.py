"""A real run on a GPU with eleven kernels that misbehave: none is chosen, each has its reason, and the run trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmmed.autotune.plan import KernelPlan
from llmmed.kernels import catalog

# What is to be said of each: its verdict, and words of the reason. The last three pass the gate.
EXPECTED = {
    "wrong_gradient": ("wrong", "gradient of weight"),
    "no_backward": ("no_backward", "do not require a gradient"),
    "mutating": ("wrong", "changes its input x"),
    "greedy": ("out_of_memory", ""),
    "does_not_compile": ("failed_to_compile", "no_such_function"),
    "hangs_the_compiler": ("timed_out", "kernels.candidate_seconds=20"),
    "illegal_access": ("crashed", "illegal memory access"),
    "waits_for_the_device": ("crashed", "stream is capturing"),
    "slow": ("verified", "the step loses"),
    "slow_in_the_step": ("verified", "the step loses"),
    "stale_under_graphs": ("verified", "in the step the gradient of"),
}


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_eleven_bad_kernels_in_a_run_on_a_gpu(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("triton")
    site, folder = tmp_path / "site", tmp_path / "run"
    information = site / "planted_on_gpu-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-on-gpu\nVersion: 1.0\n")
    points = "".join(f"rms_norm.{name} = planted_on_gpu:{name.upper()}\n" for name in EXPECTED)
    (information / "entry_points.txt").write_text(f"[{catalog.ENTRY_POINT_GROUP}]\n{points}")
    shutil.copy(Path(__file__).with_name("planted_on_gpu.py"), site)
    paths = [str(site), str(repository), os.environ.get("PYTHONPATH", "")]
    pins = [f"kernels.pin.{op}=pytorch" for op in catalog.op_names() if op not in ("rms_norm", "newton_schulz")]
    done = subprocess.run(
        [
            sys.executable, str(repository / "scripts" / "train.py"), "kernels=auto", "model=small", "model.n_layers=2",
            "data=synthetic", "tokenizer.vocab_size=512", "train.seq_len=256", "train.micro_batch_size=8",
            "train.compile=graphs", "train.max_steps=4", "logger=none", "kernels.candidate_seconds=20",
            "kernels.memory_budget_gib=20",  # memory counts, so that the step is asked about what is slow alone, too
            "kernels.budget_seconds=300",  # eight of them end the process, or its time
            f"hydra.run.dir={folder}", *pins,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    plan = KernelPlan.read(folder / "kernels.json")
    assert plan.ops["rms_norm"].chosen in ("pytorch", "triton", "liger")
    found = {name: (c.status, c.reason) for name, c in plan.ops["rms_norm"].candidates.items() if name in EXPECTED}
    wrong = {
        name: found.get(name)
        for name, (status, words) in EXPECTED.items()
        if name not in found or found[name][0] != status or words not in found[name][1]
    }
    assert not wrong, f"{wrong}\n{(folder / 'train.log').read_text()[-4000:]}"
    for name in EXPECTED:
        assert name in done.stdout, "every candidate stands in the table"
