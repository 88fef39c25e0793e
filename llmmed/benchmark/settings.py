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


def compose_benchmark(overrides: Sequence[str] = ()) -> tuple[Settings, Config]:
    """Composes `configs/benchmark.yaml` with overrides as on the command line. Raises `UserError`."""
    written = as_lists(overrides)
    return validate(compose.compose_yaml(written, config_name=CONFIG_NAME), written)


def validate(composed: DictConfig, overrides: Sequence[str] = ()) -> tuple[Settings, Config]:
    """The benchmark's own settings and the run's configuration. Raises `UserError`."""
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
    return settings, compose.validate(run, overrides)


def config_of(size: str | None, dtype: DtypeName | None, overrides: Sequence[str]) -> Config:
    """The run's configuration with another model or another compute dtype. Raises `UserError`."""
    changes = [f"model={size}"] if size else []
    changes += [f"train.precision={PRECISION[dtype]}"] if dtype else []
    return compose_benchmark([*(o for o in overrides if not o.startswith("sizes=")), *changes])[1]


def as_lists(arguments: Sequence[str]) -> list[str]:
    """`ops=rms_norm,rotary` as Hydra writes a list; it would take it for a sweep."""
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        plain = equals and key in _LISTS and not value.startswith("[")
        quoted = ",".join(f"'{part}'" if "/" in part else part for part in value.split(",")) if plain else ""
        found.append(f"{key}=[{quoted}]" if plain else argument)
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
