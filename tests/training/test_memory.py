"""Out of memory, wherever it comes: recognised, and told with what to try."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmmed.errors import UserError
from llmmed.model import Transformer
from llmmed.training import checkpoint, fits
from llmmed.training.loop import _Run
from tests.training.tiny import run, tiny_config

SAID = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"


def fails_with(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("place", ["__init__", "restore"])
def test_outside_the_steps_it_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    config = tiny_config("train.max_steps=2")
    run(config, tmp_path)
    monkeypatch.setattr(_Run, place, fails_with(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match=re.escape("out of memory in training with train.micro_batch_size=4; try")):
        run(config, tmp_path, resume=True)
    assert checkpoint.latest(tmp_path / "checkpoints") is not None


@pytest.mark.parametrize(("error", "fits_in"), [(RuntimeError(SAID), False), (RuntimeError("no such kernel"), None)])
def test_a_size_that_a_library_has_no_workspace_for_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fits_in: bool | None
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**30))
    monkeypatch.setattr(Transformer, "for_training", fails_with(error))
    if fits_in is None:
        with pytest.raises(RuntimeError, match="no such kernel"):
            fits.fits(tiny_config())
    else:
        assert fits.fits(tiny_config()) is fits_in
