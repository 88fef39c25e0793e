"""Kills a training at random moments and resumes it: `python scripts/kill_and_resume.py runs=50 seed=0`.

    python scripts/kill_and_resume.py runs=4 device=cuda train.deterministic=true kernels=triton      on a GPU

A tiny run, on the CPU unless overrides say otherwise, killed while it trains, writes a checkpoint, prepares data or
evaluates, until it comes to its end; where it trains or evaluates, half of the kills are SIGTERM, after which what was
due is owed, and all others SIGKILL. Then another, until there were as many kills as asked for. Every one must have the
losses, weights and optimizer state of a run that nobody disturbed, bit for bit. The exit code is 0 if all have.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import safe_open

from llmmed.consoles import answered_help

STEPS, EVAL_EVERY, CHECKPOINT_EVERY = 60, 4, 3
TRAIN = [
    "experiment=smoke", "device=cpu", "kernels=pytorch", "data=text", "data.path=text.txt", "tokenizer.vocab_size=512",
    f"train.max_steps={STEPS}", f"train.eval_every={EVAL_EVERY}", f"train.checkpoint_every={CHECKPOINT_EVERY}",
    "train.eval_tokens=4096", "train.log_every=1", "train.resume=auto",
]  # fmt: skip
PATIENCE_SECONDS = 120  # for a moment to come
OF_THE_MACHINE = ("tokens_per_second", "mfu", "memory_gib")  # in metrics.jsonl: no part of what is learnt
STAGES = ("training", "writing a checkpoint", "preparing data", "evaluating")


def main(arguments: list[str]) -> int:
    numbers = {"runs": 50, "seed": random.SystemRandom().randrange(10**6)}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or (key in numbers and not value.isdigit()):
            print(f"error: '{argument}': write runs=50 seed=0, or an override of train.py", file=sys.stderr)
            return 1
        if key in numbers:
            numbers[key] = int(value)
        else:
            overrides.append(argument)
    print(f"{numbers['runs']} kills, seed={numbers['seed']}", flush=True)
    with tempfile.TemporaryDirectory(prefix="llmmed-kills-") as name:
        return kill_and_resume(Path(name), overrides, numbers["runs"], random.Random(numbers["seed"]))


def kill_and_resume(folder: Path, overrides: Sequence[str], kills: int, chance: random.Random) -> int:
    words = [f"{a}{b}" for a in ("bone", "joint", "heart", "nerve", "vein") for b in ("", "s", " meets", " of")]
    lines = (" ".join(chance.choices(words, k=12)) for _ in range(3000))
    (folder / "text.txt").write_text("\n\n".join(f"{number}. {line}." for number, line in enumerate(lines)))
    began = time.perf_counter()
    undisturbed = Life(folder, "undisturbed", overrides)
    if undisturbed.process.wait() != 0:
        print(undisturbed.output.read_text(), file=sys.stderr)
        return 1
    done: Counter[str] = Counter()
    halves: set[Path] = set()
    finished = 0
    while done.total() < kills:
        run = f"run{finished}"
        while done.total() < kills:
            # Every stage in turn, so that a few kills already meet all of them.
            ended = killed(folder, run, overrides, STAGES[done.total() % len(STAGES)], chance)
            if ended is None:
                break
            stage, number = ended
            done[stage] += 1
            half = set((folder / run).glob("checkpoints/.writing-*")) - halves
            halves |= half
            told = f"{reached(folder / run)} steps on disk{' and half a checkpoint' if half else ''}"
            print(f"{done.total():3d}. killed by {number.name} while {stage}, {told}", flush=True)
        last = Life(folder, run, overrides)
        problem = differs(folder / "undisturbed", folder / run) if last.process.wait() == 0 else last.output.read_text()
        if problem:
            print(f"error: {run} after {done.total()} kills: {problem}", file=sys.stderr)
            return 1
        finished += 1
        print(f"{run} finished: bit-identical to the undisturbed run", flush=True)
    stages = ", ".join(f"{count} while {stage}" for stage, count in done.items())
    print(f"{done.total()} kills ({stages}; {len(halves)} left half a checkpoint)")
    print(f"{finished} runs, all bit-identical to the undisturbed one; {time.perf_counter() - began:.0f} s")
    return 0


class Life:
    """One process of a run, from its start or from its checkpoint."""

    def __init__(self, folder: Path, run: str, overrides: Sequence[str]) -> None:
        self.run, self.cache = folder / run, folder / "cache"
        self.output = folder / f"{run}.txt"
        script = Path(__file__).parent / "train.py"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *TRAIN, *overrides, f"hydra.run.dir={run}"],
                cwd=folder, stdout=output, stderr=output, env=os.environ | {"LLMMED_CACHE": str(self.cache)},
            )  # fmt: skip

    def is_at(self, moment: Callable[[], bool]) -> bool:
        """Waits for a moment. False if the process ends before it comes."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not moment():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True


def killed(
    folder: Path, run: str, overrides: Sequence[str], stage: str, chance: random.Random
) -> tuple[str, signal.Signals] | None:
    """Starts the run or goes on with it, and kills it at that stage.

    Returns the stage that it was killed at in truth, and by what, or None if it came to its end before.
    """
    mild = stage in ("training", "evaluating") and chance.random() < 0.5
    number = signal.SIGTERM if mild else signal.SIGKILL
    if stage == "preparing data":
        shutil.rmtree(folder / "cache", ignore_errors=True)
    first = reached(folder / run)
    life = Life(folder, run, overrides)
    target = first + chance.randint(1, 8)
    moments: dict[str, Callable[[], bool]] = {
        "preparing data": lambda: any((life.cache / "data").glob("*")),
        "training": lambda: logged(life.run)[0] >= target,
        "evaluating": lambda: logged(life.run) >= (target, False) and is_evaluating(*logged(life.run)),
        "writing a checkpoint": lambda: logged(life.run)[0] >= target and any(life.run.glob("checkpoints/.writing-*")),
    }
    if life.is_at(moments[stage]):
        time.sleep(chance.uniform(0, {"preparing data": 0.2, "training": 0.05}.get(stage, 0.002)))
    life.process.send_signal(number)
    if life.process.wait() == 0:
        return None
    prepared = "parameters" in life.output.read_text()  # the header is printed after the data is there
    return ("between data and training" if stage == "preparing data" and prepared else stage), number


def logged(run: Path) -> tuple[int, bool]:
    """The last step in the metrics of a run, and whether its evaluation is there."""
    try:
        last = json.loads((run / "metrics.jsonl").read_bytes().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return 0, False
    return last["step"], "val/loss" in last


def is_evaluating(step: int, evaluated: bool) -> bool:
    return step % EVAL_EVERY == 0 and not evaluated


def reached(run: Path) -> int:
    """The step of the newest checkpoint that is whole or seems so."""
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step_*")), default=0)


def differs(expected: Path, found: Path) -> str | None:
    """What two finished runs do not have in common, or None."""
    for name in ("model", "optimizer"):
        file = f"checkpoints/step_{STEPS:08d}/{name}.safetensors"
        with safe_open(expected / file, "np") as theirs, safe_open(found / file, "np") as ours:
            if set(theirs.keys()) != set(ours.keys()):
                return f"{name}: other tensors"
            for key in theirs.keys():  # noqa: SIM118 - no mapping
                if theirs.get_tensor(key).tobytes() != ours.get_tensor(key).tobytes():
                    return f"{name}: {key} differs"
    curves = []
    for run in (expected, found):
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves.append([{k: v for k, v in entry.items() if k not in OF_THE_MACHINE} for entry in entries])
    if curves[0] != curves[1]:
        return "metrics.jsonl differs"
    if left := list(found.glob("checkpoints/.*")):
        return f"{left[0]} was left behind"
    return None


if __name__ == "__main__":
    sys.exit(0 if answered_help(__doc__) else main(sys.argv[1:]))
