"""A key that somebody wrote and that nothing would read is an error; what YAML files set is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmmed.compose import compose, compose_yaml, validate
from llmmed.errors import UserError

TEXT, HUB = ["data=text", "data.path=notes.txt"], ["data=hub", "data.path=someone/notes"]
TRIED = ["kernels.budget_seconds=9", "kernels.candidate_seconds=9", "kernels.cache=none"]
MIXTURE = ["data=mixture", "data.sources.text.path=notes.txt"]


@pytest.fixture(autouse=True)
def _notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("The liver makes bile. " * 2000)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=notes.txt"], "data.path is not used by data=biomed; add data=text or data=hub"),
        (["data=synthetic", "data.path=notes.txt"], "data.path is not used by data=synthetic"),
        ([*TEXT, "data.streaming=true"], "data.streaming is not used by data=text; add data=hub"),
        ([*TEXT, "data.split=test"], "data.split is not used by data=text"),
        ([*TEXT, "data.revision=main"], "data.revision is not used by data=text"),
        ([*MIXTURE, "data.validation_fraction=0.1"], "as in data.sources.biomed.validation_fraction"),
        ([*MIXTURE, "data.sources.text.subset=a"], "data.sources.text.subset is not used by a source of text"),
        (["+data.weights.text=2"], "data.weights is not used by data=biomed; add data=mixture"),
        (["tokenizer.path=folder"], "tokenizer.path is not used by tokenizer=bpe; add tokenizer=hub"),
        (["optimizer.momentum=0.9"], "optimizer.momentum is not used by optimizer=adamw; add optimizer=muon"),
        (["optimizer.decay_ratio=0.1"], "optimizer.decay_ratio is not used by optimizer.schedule=cosine"),
        (
            ["optimizer.schedule=constant", "optimizer.min_lr_ratio=0"],
            "optimizer.min_lr_ratio is not used by optimizer.schedule=constant; add optimizer.schedule=cosine",
        ),
        (["optimizer.schedule=constant", "optimizer.decay_ratio=0.1"], "add optimizer.schedule=wsd"),
        (["logger=none", "logger.project=x"], "logger.project is not used by logger.mode=disabled (logger=none)"),
        (["logger=none", "logger.entity=x"], "logger.entity is not used"),
        (["logger=none", "logger.group=x"], "logger.group is not used"),
        (["logger=none", "logger.tags=[x]"], "logger.tags is not used"),
        (["logger=wandb", "logger.mode=disabled", "logger.timeout_seconds=9"], "add logger.mode=offline or online"),
        (["kernels=pytorch", "kernels.memory_budget_gib=1"], "kernels.memory_budget_gib is not used"),
        (["kernels=triton", "kernels.memory_budget_gib=1"], "kernels.memory_budget_gib is not used"),
        (["train.patience=3", "train.eval_every=0"], "train.patience is not used by train.eval_every=0"),
        (["train.sample_tokens=5", "train.sample_every=0"], "train.sample_tokens is not used by train.sample_every=0"),
    ],
)
def test_a_key_without_a_use_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    assert message in str(caught.value)


def test_what_a_resumed_run_was_started_with_is_not_refused() -> None:
    earlier, typed = (
        ["data=synthetic", "train.sample_prompts=[liver]", "optimizer.decay_ratio=0.1"],
        ["train.sample_every=0"],
    )
    composed = compose_yaml([*earlier, *typed])
    validate(composed, [*earlier, *typed], typed=typed)
    with pytest.raises(UserError, match="is not used by"):
        validate(composed, [*earlier, *typed])


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.path=null", "optimizer.momentum=null", "train.patience=0", "train.eval_every=0"],  # says that it is off
        ["experiment=biomed_small", "train.eval_every=0"],  # the experiment asks for patience
        [*HUB, "data.streaming=true", "data.subset=a", "data.split=test", "data.revision=main", "data.retries=1"],
        ["data.retries=1", "tokenizer=hub", "optimizer=muon", "optimizer.momentum=0.9"],
        ["optimizer.schedule=wsd", "optimizer.decay_ratio=0.1", "train.patience=3", "train.eval_every=5"],
        *([f"optimizer.schedule={schedule}", "optimizer.min_lr_ratio=0"] for schedule in ("cosine", "linear", "wsd")),
        ["logger=none", "logger.entity=null", "logger.tags=[]", "kernels=pytorch", "kernels.memory_budget_gib=null"],
        ["logger=wandb", "logger.project=x", "logger.tags=[x]", "logger.timeout_seconds=9"],
        ["kernels=auto", "kernels.objective=memory", "kernels.memory_budget_gib=1", "kernels.margin=0", *TRIED],
        ["kernels=pytorch", "kernels.margin=0", *TRIED],  # as the job of a sweep over kernels=auto,pytorch
    ],
)
def test_what_is_used_or_only_in_yaml_is_not(overrides: list[str]) -> None:
    compose(overrides)
