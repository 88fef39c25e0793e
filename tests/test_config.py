"""Every shipped YAML composes and validates; what depends on the device follows it; keys that others rely on exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llmmed import compose
from llmmed.config import Config
from llmmed.errors import UserError
from llmmed.kernels import catalog
from llmmed.model import parameter_count

GROUPS = ("model", "kernels", "train", "data", "tokenizer", "optimizer", "logger", "experiment")

# What commands, tests and other people's scripts rely on.
PUBLIC_KEYS = """
seed
model: n_layers d_model n_heads n_kv_heads d_ff vocab_size rope_theta norm_eps tie_embeddings
kernels: policy pin on_unavailable margin cache plan objective memory_budget_gib budget_seconds
train: max_steps seq_len micro_batch_size global_batch_tokens precision compile grad_clip eval_every checkpoint_every
train: keep_last resume deterministic dry_run
optimizer: name lr weight_decay betas schedule warmup_steps
data: name path text_field validation_fraction max_documents subset split revision streaming retries sources weights
tokenizer: name path vocab_size training_bytes
logger: mode project entity group tags
"""


# What an option leaves to the user; nothing is read from the Hub to compose.
NEEDED = {
    "data=text": ["data.path=notes.txt"],
    "data=hub": ["data.path=someone/notes"],
    "data=mixture": ["data.sources.text.path=notes.txt"],
}


def shipped_options() -> list[str]:
    folder = compose.config_folder()
    return sorted(
        f"{group}={path.stem}"
        for group in GROUPS
        for path in (folder / group).glob("*.yaml")
        if not path.stem.startswith("_")
    )


@pytest.mark.parametrize("option", shipped_options())
def test_every_shipped_option_composes(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("The liver makes bile. " * 2000)
    assert isinstance(compose.compose([option, *NEEDED.get(option, [])]), Config)


@pytest.mark.parametrize("size", ["small", "base", "medium", "large"])
def test_a_model_has_as_many_parameters_as_its_file_says(size: str) -> None:
    text = (compose.config_folder() / "model" / f"{size}.yaml").read_text(encoding="utf-8")
    said = re.search(r"# (\S+) M parameters with a vocabulary of 49,152, (\S+) M with tied embeddings", text)
    assert said is not None
    for tied, millions in zip(("false", "true"), said.groups(), strict=True):
        config = compose.compose([f"model={size}", "tokenizer.vocab_size=49152", f"model.tie_embeddings={tied}"])
        assert config.model.tie_embeddings == (tied == "true")
        assert f"{parameter_count(config.model) / 1e6:,.1f}" == millions


def test_every_group_has_options() -> None:
    assert {option.partition("=")[0] for option in shipped_options()} == set(GROUPS)


@pytest.mark.parametrize("line", [line for line in PUBLIC_KEYS.splitlines() if line])
def test_public_keys_exist(line: str) -> None:
    group, _, keys = line.partition(": ")
    values = compose.as_dict(compose.compose())
    assert group in values
    assert set(keys.split()) <= set(values[group] or {}) if keys else True


def test_no_field_has_a_default_of_its_own() -> None:
    groups = [Config, *(field.type for field in dataclasses.fields(Config))]
    import llmmed.config as module

    for name in [g if isinstance(g, str) else g.__name__ for g in groups]:
        schema = getattr(module, name, None)
        if dataclasses.is_dataclass(schema):
            for field in dataclasses.fields(schema):
                assert field.default is dataclasses.MISSING, f"{name}.{field.name}"
                assert field.default_factory is dataclasses.MISSING, f"{name}.{field.name}"


def test_device_dependent_values_are_resolved_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose, "detect_device", lambda: "cuda")
    gpu = compose.compose(["device=cuda"])
    cpu = compose.compose(["device=cpu"])
    assert (gpu.train.seq_len, gpu.train.micro_batch_size, gpu.train.precision) == (512, 48, "bf16")
    assert cpu.train.seq_len < gpu.train.seq_len
    assert cpu.train.precision == "fp32"


def test_an_override_beats_the_model_and_the_experiment() -> None:
    config = compose.compose(["experiment=smoke", "train.seq_len=32", "train.micro_batch_size=2"])
    assert (config.train.seq_len, config.train.micro_batch_size, config.train.global_batch_tokens) == (32, 2, 64)
    assert config.model.name == "tiny"


def test_pins_are_the_discovered_ops() -> None:
    assert tuple(compose.compose().kernels.pin) == catalog.op_names()
    assert compose.compose(["kernels.pin.rms_norm=triton"]).kernels.pin["rms_norm"] == "triton"


def test_yaml_without_a_schema_value_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        compose.compose(["optimizer.lr=fast"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.eps=1e-40", "optimizer.eps=1e-40: should be greater than or equal to"),
        ("optimizer.lr=inf", "optimizer.lr=Infinity: should be a finite number"),
        ("train.grad_clip=nan", "train.grad_clip=NaN: should be a finite number"),
        ("seed=18446744073709551616", "should be less than 9223372036854775808"),
        ("data=null", "data=null: data can be biomed, "),
        ("train=null", "train=null: train can be default"),
        ("data.path=", "data.path is empty; give it a value (is a variable of the shell not set?)"),
        ("kernels.plan=", "kernels.plan is empty"),
        ("kernels.plan=none.json", "the kernel plan none.json cannot be read"),
        ("data.path=d/a=b.txt", """'data.path="d/a=b.txt"'"""),
        ("data.path=d/n(1).txt", """'data.path="d/n(1).txt"'"""),
        ("data.path=~/notes", """'data.path="~/notes"'"""),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: it has too few values"),
        ("train.lr=3", "there is no key 'train.lr': did you mean optimizer.lr?"),
    ],
)
def test_a_mistake_is_one_line_that_helps(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose.compose(["data=text", override])
    assert message in str(caught.value)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("The liver makes bile. " * 2000)
    assert compose.compose(["data=text", 'data.path="~/notes.txt"']).data.path == str(tmp_path / "notes.txt")


def test_a_source_can_bring_a_tokenizer_that_the_user_overrides() -> None:
    for option in ("data=blue_scrubs", "experiment=blue_scrubs_base"):
        config = compose.compose([option])
        assert (config.tokenizer.name, config.tokenizer.path) == ("hub", "HuggingFaceTB/SmolLM-135M")
        assert config.model.vocab_size == config.tokenizer.vocab_size
        assert compose.compose([option, "tokenizer=bpe"]).tokenizer.name == "bpe"


def test_what_is_stored_composes_to_the_same_configuration() -> None:
    composed = compose.compose_yaml(["model=base"])
    stored = OmegaConf.create(OmegaConf.to_yaml(composed, resolve=True))
    assert compose.validate(stored) == compose.validate(composed)


def test_accumulation_makes_up_the_global_batch() -> None:
    config = compose.compose(["train.seq_len=64", "train.micro_batch_size=2", "train.global_batch_tokens=512"])
    assert compose.accumulation_steps(config.train) == 4
