"""From command-line overrides to a validated `Config`, and from a mistake in them to one line.

Nothing here imports torch, so that a mistake is told within a second or two.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import omegaconf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from llmmed import data, unused_keys
from llmmed.autotune.plan import KernelPlan
from llmmed.config import Config, TrainConfig, check_heads
from llmmed.errors import UserError
from llmmed.files import sha256_of
from llmmed.gpus import visible_gpus
from llmmed.kernels import catalog

CONFIG_NAME = "train"
_LONGEST_NAME, _CUT_NAME = 255, 200  # bytes, of a folder: as file systems take it, and what is left of a longer one
_ADAPTER = TypeAdapter(Config)


def compose(overrides: Sequence[str] = ()) -> Config:
    """Composes `configs/train.yaml` with overrides as on the command line. Raises `UserError`."""
    composed = compose_yaml(overrides)
    if asks_for_auto_batch(composed):
        raise UserError("train.micro_batch_size=auto is resolved by scripts/train.py alone; state a number here")
    return validate(composed, overrides)


def compose_yaml(
    overrides: Sequence[str] = (), *, with_hydra: bool = False, config_name: str = CONFIG_NAME
) -> DictConfig:
    """What the YAML files and the overrides give, not yet validated; with `with_hydra`, Hydra's own part too."""
    register()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            return hydra.compose(config_name, list(overrides), return_hydra_config=with_hydra)
    except (HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        raise UserError(explain(error, config_name)) from error
    except ValueError as error:
        for group in _groups(config_name):
            if f"{group}=null" in overrides:
                raise UserError(f"{group}=null: {group} can be {_options(group)}") from error
        raise UserError(explain(error)) from error


def validate(composed: DictConfig, overrides: Sequence[str] = (), *, typed: Sequence[str] | None = None) -> Config:
    """Types, ranges and missing keys, then what only several keys together can tell. Raises `UserError`.

    Args:
        composed: The composed YAML without Hydra's own part.
        overrides: What the user wrote. Of several problems, one that they wrote is named first.
        typed: Those of the overrides that are refused where nothing reads their keys; None for all.

    `train.micro_batch_size=auto` is validated as one sequence; `micro_batch.resolve` replaces it before a run.
    """
    if asks_for_auto_batch(composed):
        composed = with_micro_batch(composed, 1)
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    try:
        # Through JSON, where strict typing still lets a list be a tuple.
        config = _ADAPTER.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(explain_validation(error, overrides)) from error
    unused_keys.refuse(config, overrides if typed is None else typed)
    _check_together(config)
    data.check(config)
    return config


def asks_for_auto_batch(composed: DictConfig) -> bool:
    """Whether `train.micro_batch_size` is `auto`. Raises `UserError` if the size of the step would depend on it."""
    train = composed.get("train")
    if not isinstance(train, DictConfig) or OmegaConf.is_missing(train, "micro_batch_size"):
        return False
    if train.get("micro_batch_size") != "auto":
        return False
    stated = OmegaConf.to_container(train, resolve=False)
    if isinstance(stated, dict) and "micro_batch_size" in str(stated.get("global_batch_tokens")):
        raise UserError(
            "train.micro_batch_size=auto needs the size of a step, which must not depend on the GPU: state "
            "train.global_batch_tokens, a multiple of train.seq_len, for instance train.global_batch_tokens=24576"
        )
    return True


def with_micro_batch(composed: DictConfig, size: int) -> DictConfig:
    """A copy with that `train.micro_batch_size`."""
    copy = composed.copy()
    OmegaConf.update(copy, "train.micro_batch_size", size)
    return copy


def as_dict(config: Config) -> dict[str, Any]:
    """The whole configuration, resolved, as plain JSON types."""
    values: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return values


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration that `as_dict` wrote. Raises `pydantic.ValidationError`."""
    return _ADAPTER.validate_json(json.dumps(values), strict=True)


def config_folder() -> Path:
    """The YAML files: beside the package in a checkout, inside it where it was installed as a library."""
    package = Path(__file__).parent
    return next(folder for folder in (package.parent / "configs", package / "configs") if folder.is_dir())


def register() -> None:
    """Makes the resolvers and the discovered keys of `kernels.pin` known to Hydra. May be called again."""
    OmegaConf.register_new_resolver("detect_device", detect_device, replace=True)
    OmegaConf.register_new_resolver("gpu_or_cpu", _gpu_or_cpu, replace=True)
    OmegaConf.register_new_resolver("gpu_count", lambda: max(1, len(visible_gpus())), replace=True)
    OmegaConf.register_new_resolver("groups_and_options", _groups_and_options, replace=True)
    OmegaConf.register_new_resolver("mul", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("short_names", _short_names, replace=True)
    pins = dict.fromkeys(catalog.op_names())
    ConfigStore.instance().store(name="discovered", group="kernels/pin", node=pins, package="kernels.pin")


def detect_device() -> str:
    """`cuda` where this machine has an NVIDIA GPU that a CUDA build of torch may see, else `cpu`. Imports no torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1", "NoDevFiles"):
        return "cpu"
    present = (
        Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()
    )
    return "cuda" if present and _torch_is_cuda_build() else "cpu"


def accumulation_steps(train: TrainConfig) -> int:
    """Micro-batches an optimizer step. Raises `UserError` if they do not make up the global batch."""
    micro_batch_tokens = train.micro_batch_size * train.seq_len
    steps, rest = divmod(train.global_batch_tokens, micro_batch_tokens)
    if rest or not steps:
        near = sorted({max(1, steps) * micro_batch_tokens, (steps + 1) * micro_batch_tokens})
        raise UserError(
            f"train.global_batch_tokens={train.global_batch_tokens} is not a multiple of train.micro_batch_size x "
            f"train.seq_len = {train.micro_batch_size} x {train.seq_len} = {micro_batch_tokens}; "
            f"the nearest that are: {' and '.join(map(str, near))}"
        )
    return steps


def explain(error: Exception, config_name: str = CONFIG_NAME) -> str:
    """One line for an exception of Hydra or OmegaConf: what was wrong, where, what is allowed."""
    text = str(error)
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^']+)'", text)
        if found and "/" in found[1]:
            group, _, option = found[1].rpartition("/")
            return f"{group}={option}: no such option; {group} can be {_options(group)}"
    if isinstance(error, OverrideParseException):
        return _explain_override(str(error.override))
    if isinstance(error, ConfigCompositionException):
        if found := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
            return f"'{found[1]}' is no group; the groups are {', '.join(_groups(config_name))}"
        if found := re.search(
            r"Could not (?:override|delete|append to config\. An item is already at) '([^']+)'", text
        ):
            return _explain_key(found[1], config_name)
    if isinstance(error, omegaconf.errors.MissingMandatoryValue):
        return f"{getattr(error, 'full_key', None) or 'a key'} has no value; give it one"
    return " ".join(text.split()) or type(error).__name__


def quoted(value: Path | str, mark: str = "'") -> str:
    """A value of Hydra's override grammar, whatever characters but `${` are in it. There a backslash is escaped only
    where a quotation mark comes next."""
    escaped = re.sub(rf"(\\*)({mark}|$)", lambda found: 2 * found[1] + (found[2] and f"\\{mark}"), str(value))
    return f"{mark}{escaped}{mark}"


def _explain_override(override: str) -> str:
    key, equals, value = override.partition("=")
    if equals and re.fullmatch(r"[+~]*[\w./@-]+", key) and not value.startswith(("[", "{", '"', "'")):
        in_quotes = quoted(value, mark='"')
        return f"{override}: a value with such characters needs quotes, within those of the shell: '{key}={in_quotes}'"
    return f"'{override}' is not an override; write key=value, for instance train.max_steps=200"


def _explain_key(key: str, config_name: str) -> str:
    """Why a key cannot be overridden: it does not exist. Names what does."""
    if key in _groups(config_name):
        return f"'{key}' is a group; it can be {_options(key)}"
    known = sorted(_keys(OmegaConf.to_container(compose_yaml(config_name=config_name), resolve=False)))
    if key in known:
        return f"'{key}' does not go together with what the other overrides choose; leave one of them out"
    parent, _, last = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    elsewhere = [name for name in known if name.endswith(f".{last}")]
    near = elsewhere if 0 < len(elsewhere) < 4 else difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help for all keys"
    where = f"; {parent} has {', '.join(siblings)}" if parent and siblings else ""
    return f"there is no key '{key}': {hint}{where}"


def explain_validation(error: ValidationError, overrides: Sequence[str]) -> str:
    """One line for a value that is not allowed; of several, one that the user wrote."""
    written = {override.lstrip("+~").partition("=")[0] for override in overrides}
    problems = error.errors()
    problem = next((p for p in problems if ".".join(map(str, p["loc"])) in written), problems[0])
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing" and isinstance(problem["input"], list):
        list_key = ".".join(str(part) for part in problem["loc"][:-1])
        return f"{list_key}={json.dumps(problem['input'])}: it has too few values"
    if problem["type"] == "string_too_short":
        return f"{key} is empty; give it a value (is a variable of the shell not set?) or leave it out"
    if problem["type"] == "missing":
        return f"{key} is missing; every key of the configuration is needed, so it cannot be removed with ~{key}"
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: there is no such key, and none can be added with +{key}"
    message = problem["msg"].removeprefix("Input ").removeprefix("Value ")
    return f"{key}={json.dumps(problem['input'])}: {message}"


def _check_together(config: Config) -> None:
    check_heads(config.model)
    if config.optimizer.name == "muon" and config.optimizer.momentum is None:
        raise UserError("optimizer.momentum=null: Muon needs one; try optimizer.momentum=0.95")
    accumulation_steps(config.train)
    if config.device == "cuda" and detect_device() != "cuda":
        raise UserError(
            "device=cuda: there is no CUDA GPU here, or torch is a CPU build; leave it out or use device=cpu"
        )
    if config.data.name != "synthetic" and config.model.vocab_size < config.tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than tokenizer.vocab_size="
            f"{config.tokenizer.vocab_size}; make it at least as large"
        )
    _check_pins(config)
    if config.kernels.plan is not None and config.train.resume is None:  # else a checkpoint may have it
        KernelPlan.read_stated("kernels.plan", config.kernels.plan)


def _check_pins(config: Config) -> None:
    for op, name in config.kernels.pin.items():
        if op not in catalog.op_names():
            raise UserError(f"kernels.pin.{op}: there is no op '{op}'; the ops are {', '.join(catalog.op_names())}")
        if name is not None and name not in catalog.implementation_names(op):
            raise UserError(f"kernels.pin.{op}={name}: {catalog.no_such_implementation(op, name)}")


def _gpu_or_cpu(on_gpu: Any, on_cpu: Any, *, _root_: DictConfig) -> Any:
    return on_gpu if _root_.device == "cuda" else on_cpu


def _short_names(path: str) -> str:
    """The path with names that file systems take: of one that is too long, the beginning and a hash of all of it."""

    def short(name: str) -> str:
        encoded = name.encode()
        if len(encoded) <= _LONGEST_NAME:
            return name
        return f"{encoded[:_CUT_NAME].decode(errors='ignore')}-{sha256_of([name])[:8]}"

    return "/".join(map(short, path.split("/")))


def _torch_is_cuda_build() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).parent / "version.py"
    return bool(re.search(r"^cuda[^=\n]*= *['\"]", version.read_text(encoding="utf-8"), re.MULTILINE))


def _groups(config_name: str) -> list[str]:
    others = {"hydra", "benchmark" if config_name == CONFIG_NAME else "experiment"}
    return sorted(p.name for p in config_folder().iterdir() if p.is_dir() and p.name not in others)


def _options(group: str) -> str:
    folder = config_folder() / group
    return ", ".join(sorted(p.stem for p in folder.glob("*.yaml") if not p.stem.startswith("_"))) or "nothing"


def _groups_and_options(config_name: str) -> str:
    """For `--help`: a line for each group that one may choose from. Hydra's own list has parts of files in it."""
    return "\n".join(f"{group}: {_options(group)}" for group in _groups(config_name))


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
