"""The keys of a benchmark, beside those of a run: validated by dataclasses, every default visible in `configs/`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

import omegaconf
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from llmmed import compose
from llmmed.config import Config, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from llmmed.errors import UserError
from llmmed.kernels import catalog

CONFIG_NAME = "benchmark"
ALL = "all"
_STRICT = ConfigDict(extra="forbid")
_LISTS = ("ops", "dtypes", "modes", "sizes", "contestants", "report")

DtypeName = Literal["float32", "bfloat16", "float16"]
ModeName = Literal["eager", "compiled", "graphs"]
PRECISION: dict[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(config=_STRICT, frozen=True)
class Common:
    """What both benchmarks have."""

    sizes: list[str]
    seconds: PositiveFloat
    report: list[str]
    page: str


@dataclass(config=_STRICT, frozen=True)
class OpsSettings(Common):
    """`benchmark=ops`."""

    kind: Literal["ops"]
    ops: Annotated[list[str], Field(min_length=1)]
    dtypes: Annotated[list[DtypeName], Field(min_length=1)]
    modes: Annotated[list[ModeName], Field(min_length=1)]
    peers: bool

    @property
    def op_names(self) -> tuple[str, ...]:
        return catalog.op_names() if ALL in self.ops else tuple(dict.fromkeys(self.ops))


@dataclass(config=_STRICT, frozen=True)
class StepSettings(Common):
    """`benchmark=step`."""

    kind: Literal["step"]
    contestants: Annotated[list[str], Field(min_length=1)]
    rounds: Positive
    blocks: Positive
    block_steps: Positive
    warm_up_steps: NonNegative
    warm_up_seconds: NonNegativeFloat
    profile_steps: NonNegative
    contestant_seconds: PositiveFloat


Settings = OpsSettings | StepSettings
_ADAPTER: TypeAdapter[OpsSettings | StepSettings] = TypeAdapter(
    Annotated[OpsSettings | StepSettings, Field(discriminator="kind")]
)


def compose_benchmark(overrides: Sequence[str] = (), own: Sequence[str] = ()) -> tuple[Settings, Config]:
    """Composes `configs/benchmark.yaml` with overrides as on the command line. Raises `UserError`.

    `own` come after them: what a benchmark itself sets for a contestant or a dtype.
    """
    written = [*as_lists(overrides), *as_lists(own)]
    composed = compose.compose_yaml(written, config_name=CONFIG_NAME)
    settings, config = validate(composed, written, typed=() if own else None)  # a contestant need not use every key
    _refuse_what_would_not_count(settings, as_lists(overrides))
    return settings, config


def validate(
    composed: DictConfig, overrides: Sequence[str] = (), *, typed: Sequence[str] | None = None
) -> tuple[Settings, Config]:
    """The benchmark's own settings and the run's configuration. Raises `UserError`.

    `typed` are those of the overrides that are refused where nothing reads their keys; None for all.
    """
    try:
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise UserError(compose.explain(error, CONFIG_NAME)) from error
    known = {field.name for field in fields(Config)}
    try:
        own = json.dumps({key: value for key, value in values.items() if key not in known})
        settings = _ADAPTER.validate_json(own, strict=True)
    except ValidationError as error:
        raise UserError(compose.explain_validation(error, overrides).removeprefix(f"{values.get('kind')}.")) from error
    _check(settings, overrides)
    run = OmegaConf.create({key: value for key, value in values.items() if key in known})
    return settings, compose.validate(run, overrides, typed=typed)


def config_of(size: str | None, dtype: DtypeName | None, overrides: Sequence[str], own: Sequence[str] = ()) -> Config:
    """The run's configuration with another model, compute dtype, or what a contestant sets. Raises `UserError`."""
    changes = [f"model={size}"] if size else []
    changes += [f"train.precision={PRECISION[dtype]}"] if dtype else []
    return compose_benchmark([o for o in overrides if not o.startswith("sizes=")], [*changes, *own])[1]


def as_lists(arguments: Sequence[str]) -> list[str]:
    """`ops=rms_norm,rotary` as Hydra writes a list; it would take it for a sweep."""
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        plain = equals and key in _LISTS and not value.startswith("[")
        parts = ",".join(compose.quoted(part) if "/" in part else part for part in value.split(",")) if plain else ""
        found.append(f"{key}=[{parts}]" if plain else argument)
    return found


def _check(settings: Settings, overrides: Sequence[str]) -> None:
    models = sorted(path.stem for path in (compose.config_folder() / "model").glob("*.yaml"))
    for size in settings.sizes:
        if size not in models:
            raise UserError(f"sizes={size}: there is no such model; there are {', '.join(models)}")
    if settings.sizes and any(override.startswith("model=") for override in overrides):
        raise UserError("model= and sizes= exclude each other; sizes=small,base measures several models")
    if isinstance(settings, OpsSettings):
        for op in settings.ops:
            if op not in (ALL, *catalog.op_names()):
                raise UserError(f"ops={op}: there is no such op; the ops are {', '.join(catalog.op_names())}, or all")
    else:
        from llmmed.benchmark.contestants import CONTESTANTS  # which imports much

        names = [contestant.name for contestant in CONTESTANTS]
        for index, name in enumerate(settings.contestants):
            if name not in (ALL, *names):
                raise UserError(f"contestants={name}: there is no such one; there are {', '.join(names)}, or all")
            if name in settings.contestants[:index]:
                raise UserError(f"contestants=...: {name} is there twice")


_ELSEWHERE = {  # keys that a benchmark sets itself -> what to write instead
    "ops": {
        "train.precision": "a benchmark of ops goes through dtypes itself; write dtypes=float16",
        "train.compile": "a benchmark of ops goes through modes itself; write modes=eager,graphs",
    },
    "step": {
        "kernels": "each contestant has kernels of its own; write contestants=ours_auto,ours_graphs",
        "kernels.policy": "each contestant has kernels of its own; write contestants=ours_auto,ours_graphs",
        "train.compile": "each contestant has a mode of its own; write contestants=ours_eager,plain_eager",
        "optimizer.schedule": "all contestants train at a constant rate, and speed does not hang on it; leave it out",
        "optimizer.warmup_steps": "all contestants train at a constant rate from the first step on; leave it out",
        "optimizer.min_lr_ratio": "all contestants train at a constant rate; leave it out",
    },
}


def _refuse_what_would_not_count(settings: Settings, overrides: Sequence[str]) -> None:
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if instead := _ELSEWHERE[settings.kind].get(key):
            raise UserError(f"{override}: {instead}")
        if isinstance(settings, StepSettings) and key == "train.activation_checkpointing" and value != "none":
            ours = [name for name in settings.contestants if name.startswith("ours_")]
            if ours != settings.contestants:
                told = ",".join(ours or ["ours_auto"])
                raise UserError(f"{override}: llmmed's contestants alone take it; write contestants={told} beside it")
