"""`train.profile_steps`: a trace of a few steps after warm-up, for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llmmed.run_folder import shown

_WARM_UP = 5  # steps: compiling, capturing and the allocator's growth are over by then


class StepTrace:
    """Records `steps` steps of a run that goes from `first` to `last`. With 0 it does nothing.

    A run too short for the warm-up is recorded at its end.
    """

    def __init__(self, path: Path, steps: int, first: int, last: int, device: torch.device) -> None:
        self._path, self._device = path, device
        self._start = max(first, min(first + _WARM_UP, last - steps)) if steps else -1
        self._stop = min(last, self._start + steps)
        self._profile: profile | None = None

    @property
    def recording(self) -> bool:
        """Whether it goes on now; two profilers at once cannot be."""
        return self._profile is not None

    def before(self, step: int) -> None:
        """Step `step`, from 0, is about to run."""
        if step == self._start:
            on_gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu], acc_events=True)
            self._profile.start()

    def after(self, done: int) -> str | None:
        """`done` steps have been made. Returns what to tell, once the trace is written."""
        return self.write(done) if self._profile is not None and done >= self._stop else None

    def write(self, done: int) -> str | None:
        """Ends a recording that is going on, whatever it has."""
        if self._profile is None:
            return None
        recorded, self._profile = self._profile, None
        recorded.stop()
        temporary = self._path.with_name(f".{self._path.name.removesuffix('.json.gz')}-{os.getpid()}.json.gz")
        try:
            recorded.export_chrome_trace(str(temporary))
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        return (
            f"steps {self._start + 1} to {done} are traced in {shown(self._path)}; open it at https://ui.perfetto.dev"
        )
