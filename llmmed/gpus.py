"""Which GPUs there are, and one of them for each of several jobs at a time. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from llmmed.files import try_lock

_SECONDS_BETWEEN_LOOKS = 0.5


def visible_gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may name here, in order; nothing without a GPU. Makes no CUDA context."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


@contextlib.contextmanager
def own_gpu(*, wanted: bool = True) -> Iterator[dict[str, str]]:
    """The environment in which a job sees one GPU that no other job of this user has; waits until one is free.

    With one GPU or none there is nothing to share out, nor if none is `wanted`. A lock is gone with the process that
    holds it.
    """
    gpus = visible_gpus() if wanted else []
    if len(gpus) < 2:
        yield {}
        return
    folder = Path(tempfile.gettempdir()) / f"llmmed-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    while True:
        for gpu in gpus:
            with (folder / f"{gpu.replace('/', '-')}.lock").open("w") as file:
                if try_lock(file):
                    yield {"CUDA_VISIBLE_DEVICES": gpu}
                    return
        time.sleep(_SECONDS_BETWEEN_LOOKS)
