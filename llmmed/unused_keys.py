"""Keys that somebody wrote and that nothing reads under the options chosen: told, not ignored.

Only what the command line names counts. Experiments and the groups' own files may set what a run does not use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmmed.config import Config, DataConfig, LoggerConfig
from llmmed.errors import UserError

_SOURCES_THAT_USE = {
    "path": ("text", "hub"),
    "text_field": ("text", "hub"),
    "validation_fraction": ("biomed", "text", "hub", "synthetic"),
    "max_documents": ("biomed", "text", "hub"),
    "subset": ("hub",),
    "split": ("hub",),
    "revision": ("hub",),
    "streaming": ("hub",),
    "retries": ("hub",),
    "sources": ("mixture",),
    "weights": ("mixture",),
}


def refuse(config: Config, overrides: Sequence[str]) -> None:
    """Raises `UserError` for an override of a key that is not used, and says with what it would be."""
    written = {override.lstrip("+").partition("=")[0] for override in overrides}
    for key, chosen, remedy in _unused(config):
        if any(name == key or name.startswith(f"{key}.") for name in written):
            raise UserError(f"{key} is not used by {chosen}; {remedy}")


def _unused(config: Config) -> Iterator[tuple[str, str, str]]:
    """Each key without a use that has a value, what is chosen instead, and what to do."""
    optimizer, tokenizer = config.optimizer, config.tokenizer
    yield from _unused_of_source("data", config.data, tokenizer.name == "hub")
    for key, source in config.data.sources.items():
        yield from _unused_of_source(f"data.sources.{key}", source, retries=False)
    if tokenizer.name == "bpe" and tokenizer.path is not None:
        yield "tokenizer.path", "tokenizer=bpe", "add tokenizer=hub"
    if tokenizer.name == "hub" and tokenizer.training_bytes is not None:
        yield "tokenizer.training_bytes", "tokenizer=hub", "add tokenizer=bpe"
    if optimizer.name == "adamw" and optimizer.momentum is not None:
        yield "optimizer.momentum", "optimizer=adamw", "add optimizer=muon"
    if optimizer.schedule != "wsd":
        yield "optimizer.decay_ratio", f"optimizer.schedule={optimizer.schedule}", "add optimizer.schedule=wsd"
    if optimizer.schedule == "constant":
        yield "optimizer.min_lr_ratio", "optimizer.schedule=constant", "add optimizer.schedule=cosine, linear or wsd"
    if config.kernels.policy != "auto" and config.kernels.memory_budget_gib is not None:
        # Of what says how kernels are chosen, this alone is a limit that one relies on. The rest is left to the jobs of
        # a sweep over policies that choose.
        yield "kernels.memory_budget_gib", f"kernels={config.kernels.policy}", "add kernels=auto"
    yield from _unused_of_logger(config.logger)
    if not config.train.sample_every:
        yield "train.sample_tokens", "train.sample_every=0", "add train.sample_every=<steps between two samples>"
        yield "train.sample_prompts", "train.sample_every=0", "add train.sample_every=<steps between two samples>"
    if config.train.patience and not config.train.eval_every:
        yield "train.patience", "train.eval_every=0", "add train.eval_every=<steps between two evaluations>"


def _unused_of_logger(logger: LoggerConfig) -> Iterator[tuple[str, str, str]]:
    if logger.mode == "disabled":
        for key in ("project", "entity", "group", "tags", "timeout_seconds"):
            if getattr(logger, key) not in (None, []):
                yield f"logger.{key}", "logger.mode=disabled (logger=none)", "add logger.mode=offline or online"


def _unused_of_source(prefix: str, source: DataConfig, retries: bool) -> Iterator[tuple[str, str, str]]:
    for key, users in _SOURCES_THAT_USE.items():
        value = getattr(source, key)
        if source.name in users or value is None or value == {} or (key == "retries" and retries):
            continue
        if source.name == "mixture":
            remedy = f"give it to one of its sources, as in {prefix}.sources.{next(iter(source.sources), 'text')}.{key}"
        elif prefix == "data":
            remedy = f"add {' or '.join(f'data={name}' for name in users)}"
        else:
            remedy = f"it is for one of {' or '.join(users)}"
        yield f"{prefix}.{key}", f"data={source.name}" if prefix == "data" else f"a source of {source.name}", remedy
