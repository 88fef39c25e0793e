"""`train.micro_batch_size=auto`: the search, what it needs to be told, and where the number is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llmmed import compose, micro_batch
from llmmed.errors import UserError
from llmmed.micro_batch import divisors, largest_that_fits
from llmmed.training.fits import fits
from llmmed.training.memory import advice
from tests.processes import run_script
from tests.training.tiny import tiny_config

AUTO = ["experiment=smoke", "data=synthetic", "kernels=pytorch", "device=cpu", "train.micro_batch_size=auto"]


@pytest.mark.parametrize("sizes", [[1], [1, 2, 3, 6], [1, 2, 3, 4, 6, 8, 12, 16, 24, 48], [2**n for n in range(12)]])
def test_the_search_finds_the_largest_that_was_tried_and_fits(sizes: list[int]) -> None:
    for memory in range(sizes[-1] + 2):
        tried: dict[int, bool] = {}

        def fits_into(size: int, memory: int = memory, tried: dict[int, bool] = tried) -> bool:
            assert size not in tried
            tried[size] = size <= memory
            return tried[size]

        found = largest_that_fits(sizes, fits_into)
        assert found == max((size for size in sizes if size <= memory), default=None)
        assert found is None or tried[found]
        assert next(iter(tried)) == sizes[-1]
        assert len(tried) <= 1 + len(sizes).bit_length()


def test_only_sizes_that_make_up_the_step_are_tried() -> None:
    train = tiny_config("train.micro_batch_size=4", "train.global_batch_tokens=192").train  # 12 sequences of 16
    assert divisors(train) == [1, 2, 3, 4, 6, 12]


def test_a_step_that_would_depend_on_the_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"state train\.global_batch_tokens"):
        compose.validate(compose.compose_yaml(AUTO), AUTO)


def test_the_step_must_be_whole_sequences() -> None:
    overrides = [*AUTO, "train.global_batch_tokens=100"]
    with pytest.raises(UserError, match=r"train\.global_batch_tokens=100 is not a multiple"):
        compose.validate(compose.compose_yaml(overrides), overrides)


@pytest.mark.parametrize(("tokens", "expected"), [(512, 8), (64 * 12, 6), (64 * 7, 7), (64, 1)])
def test_on_a_cpu_it_is_what_the_configuration_states(tmp_path: Path, tokens: int, expected: int) -> None:
    overrides = [*AUTO, f"train.global_batch_tokens={tokens}"]  # the experiment states 8 sequences of 64
    said: list[str] = []
    found = micro_batch.resolve(compose.compose_yaml(overrides), overrides, tmp_path, said.append)
    config = compose.validate(found, overrides)
    assert (config.train.micro_batch_size, config.train.global_batch_tokens) == (expected, tokens)
    assert said == [f"train.micro_batch_size=auto: {expected}; on a CPU it is not searched for but taken from the "
                    "configuration"]  # fmt: skip


def test_a_key_that_an_earlier_override_needed_is_not_refused_again(tmp_path: Path) -> None:
    overrides = [*AUTO, "train.global_batch_tokens=512", "kernels=pytorch", "kernels.memory_budget_gib=9"]
    found = micro_batch.resolve(compose.compose_yaml(overrides), overrides, tmp_path, lambda line: None)
    assert found.train.micro_batch_size == 8


def test_a_number_is_left_alone(tmp_path: Path) -> None:
    composed = compose.compose_yaml(AUTO[:-1])
    assert micro_batch.resolve(composed, AUTO[:-1], tmp_path, pytest.fail) is composed


def test_scripts_that_do_not_resolve_it_refuse_it() -> None:
    with pytest.raises(UserError, match=r"scripts/train\.py alone"):
        compose.compose([*AUTO, "train.global_batch_tokens=512"])


@pytest.mark.slow
def test_a_run_stores_the_number_and_its_continuation_keeps_it(tmp_path: Path, repository: Path) -> None:
    def train(*overrides: str) -> str:
        done = run_script(repository / "scripts" / "train.py", [*AUTO, "hydra.run.dir=run", *overrides], tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stored() -> int:
        return int(OmegaConf.load(tmp_path / "run" / ".hydra" / "config.yaml").train.micro_batch_size)

    tokens = "train.global_batch_tokens=256"
    train(tokens, "train.max_steps=2")
    assert stored() == 4
    assert "4, as this run began" in train(tokens, "train.max_steps=3", "train.resume=auto")
    assert stored() == 4


def test_out_of_memory_names_what_may_fit() -> None:
    train = tiny_config("train.micro_batch_size=6", "train.global_batch_tokens=192").train
    assert advice(train).endswith(
        "try train.micro_batch_size=4 train.global_batch_tokens=192, or auto in place of 4 for what fits a GPU, or "
        "train.activation_checkpointing=block"
    )
    one = replace(train, micro_batch_size=1)
    assert advice(one).endswith("try train.activation_checkpointing=block")
    assert "shorter train.seq_len" in advice(replace(one, activation_checkpointing="block"))


@pytest.mark.gpu
def test_on_a_gpu_a_small_batch_fits_and_a_huge_one_does_not() -> None:
    assert fits(tiny_config("device=cuda"))
    assert not fits(tiny_config("device=cuda", "train.seq_len=2048", "train.micro_batch_size=200000"))
