"""Launches that a search may choose: what a `Tunable` answers, and that every alternative is right and fits."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from llmmed.autotune.launch_search import open_sites
from llmmed.autotune.verify import verify
from llmmed.kernels import catalog
from llmmed.kernels.ahead_of_time import TARGETS
from llmmed.kernels.base import Implementation, Op
from llmmed.kernels.catalog import get_implementation, get_op, implementation_names, load_function, op_names
from llmmed.kernels.cross_entropy.triton_impl import alternatives as row_alternatives
from llmmed.kernels.cross_entropy.triton_impl import launch as row_launch
from llmmed.kernels.linear_cross_entropy.triton_impl import in_place_launch
from llmmed.kernels.operator import INTERPRETED, absent_gpu, as_in_compiled_step
from llmmed.kernels.tunable import MOST_ALTERNATIVES, Launches, Site, Tunable, Values, seen_launches

CPU = torch.device("cpu")
TRITON = [(op, name) for op in op_names() for name in implementation_names(op) if name.startswith("triton")]


class Launch(NamedTuple):
    block: int
    num_warps: int


def planted() -> Tunable[Launch]:
    def alternatives(device: torch.device, width: int) -> Iterator[Launch]:
        for block in (width, 2 * width, 2 * width, *range(100, 200)):
            yield Launch(block, 4)

    return Tunable("planted_kernel", lambda device, width: Launch(width, 4), alternatives)


SITE = Site("planted_kernel", (("width", 8),))


def test_a_launch_is_the_default_until_another_is_taken() -> None:
    tunable = planted()
    assert tunable(CPU, width=8) == Launch(8, 4)
    tunable.take({SITE: {"block": 32, "num_warps": 1}})
    assert tunable(CPU, width=8) == Launch(32, 1)
    assert tunable(CPU, width=9) == Launch(9, 4)
    tunable.take({})
    assert tunable(CPU, width=8) == Launch(8, 4)


def test_launches_are_seen() -> None:
    tunable = planted()
    with seen_launches() as seen:
        tunable(CPU, width=8)
        tunable.take({SITE: {"block": 32, "num_warps": 1}})
        tunable(CPU, width=8)
    tunable(CPU, width=9)
    assert seen == {SITE: {"block": 32, "num_warps": 1}}


def test_alternatives_are_few_and_none_is_the_default() -> None:
    found = planted().alternatives(CPU, SITE)
    assert found[:2] == [{"block": 16, "num_warps": 4}, {"block": 100, "num_warps": 4}]
    assert len(found) == MOST_ALTERNATIVES


@pytest.mark.parametrize(
    ("launches", "told"),
    [
        ({SITE: {"block": 32}}, "has no launch by block but by block, num_warps"),
        ({Site("planted_kernel", (("height", 8),)): {"block": 32, "num_warps": 1}}, "does not depend on height"),
        ({Site("another_kernel", (("width", 8),)): {"block": 32, "num_warps": 1}}, "has no kernel another_kernel"),
    ],
)
def test_a_launch_of_another_version_is_refused(
    launches: Launches, told: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunable = planted()
    implementation = Implementation("planted", load=lambda: lambda: None, tunable=(tunable,))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=told):
        implementation.take_launches(launches)
    monkeypatch.setattr(catalog, "get_implementation", lambda op, name: implementation)
    tunable.take({SITE: {"block": 32, "num_warps": 1}})
    with caplog.at_level(logging.WARNING):
        catalog.load_kernels({"rms_norm": "planted"}, {"rms_norm": {"planted": launches}})
    assert told in caplog.text
    assert tunable(CPU, width=8) == Launch(8, 4)


def test_the_losses_launch_changes_where_a_row_each_fills_half_of_the_cache() -> None:
    with absent_gpu(TARGETS[90]):
        vocabularies = (49152, 49664, 50304, 65536, 98304, 99328, 128256, 131072)
        found = {vocab: row_launch(CPU, vocab, 2) for vocab in vocabularies}
        options = {vocab: list(row_alternatives(CPU, vocab, 2)) for vocab in found}
        unaligned, without_gradient = row_launch(CPU, 131073, 2), row_launch(CPU, 131072, 2, gradient=False)
        none_held = [*row_alternatives(CPU, 131073, 2), *row_alternatives(CPU, 131072, 2, gradient=False)]
    resident, held, ahead = (16384, 1, 32, 1, 0), (16384, 1, 16, 1, 32768), (16384, 4, 16, 2, 0)
    assert found == {vocab: resident if vocab < 99000 else held for vocab in vocabularies}
    for vocab, launch in found.items():
        assert {resident, held, ahead} <= {launch, *options[vocab]}
        assert len({launch, *options[vocab]}) <= MOST_ALTERNATIVES + 1
    assert unaligned == without_gradient == ahead
    assert not any(launch.held for launch in none_held)


def test_in_place_two_rows_a_multiprocessor_are_under_way_where_the_cache_holds_them() -> None:
    with absent_gpu(TARGETS[90]):
        assert in_place_launch(CPU, 49152, 2) == (8192, 1, 16, 2, 0)
        for vocab in (16384, 65536, 131072):
            assert in_place_launch(CPU, vocab, 2) == row_launch(CPU, vocab, 2)
    with absent_gpu(TARGETS[80]):  # 40 MiB
        assert in_place_launch(CPU, 49152, 2) == row_launch(CPU, 49152, 2)


@pytest.mark.parametrize(("op", "name"), TRITON)
def test_every_implementation_of_ours_can_be_tuned(op: str, name: str) -> None:
    assert get_implementation(op, name).tunable


@pytest.mark.interpreter
@pytest.mark.parametrize(("op_name", "name"), TRITON)
def test_every_alternative_is_right(op_name: str, name: str) -> None:
    """At the op's first and last case, in float32, which is what the interpreter can do. Kernels vary together."""
    whole, implementation = get_op(op_name), get_implementation(op_name, name)
    function = load_function(op_name, implementation)
    cases = list(whole.cases(torch.float32))
    for case in dict.fromkeys((cases[0], cases[-1])):

        def judge(launches: Launches, op: Op = whole, case: str = case) -> dict[Site, Values]:
            implementation.take_launches(launches)
            try:
                with seen_launches() as seen:
                    verdict = verify(op, implementation, function, [], CPU, dtype=torch.float32, cases=[case])
            finally:
                implementation.take_launches({})
            assert verdict.status == "verified", (case, launches, verdict)
            return seen

        # To see where there is a choice, some values are enough.
        options = alternatives(implementation, judge({}, replace(whole, regimes=whole.regimes[:1])))
        assert options
        for index in range(max(map(len, options.values()))):
            launches = {site: found[index % len(found)] for site, found in options.items()}
            assert launches.items() <= judge(launches).items()


def alternatives(implementation: Implementation, sites: Iterable[Site]) -> dict[Site, list[Values]]:
    """Those of 16 bits, of which there are the most."""
    found = {}
    for tunable in implementation.tunable:
        for site in sites:
            if site.kernel == tunable.kernel:
                at = tuple((n, 2 if n == "itemsize" else value) for n, value in site.at)
                found[site] = tunable.alternatives(CPU, Site(site.kernel, at))
    return {site: values for site, values in found.items() if values}


@pytest.mark.skipif(INTERPRETED, reason="calls are made on tensors without memory, which the interpreter reads")
def test_in_a_compiled_step_the_launch_without_a_gradient_is_the_one_to_search() -> None:
    """There the forward operator writes none: backward does."""
    op, implementation = get_op("cross_entropy"), get_implementation("cross_entropy", "triton")
    call = op.cases(torch.bfloat16)["large vocabulary"]
    with absent_gpu(TARGETS[90]):
        function = load_function("cross_entropy", implementation)
        found = {}
        for compiled in (False, True):
            with as_in_compiled_step(compiled):
                sites = open_sites(op, implementation, function, [call], CPU)
            found[compiled] = [dict(each.site.at)["gradient"] for each in sites]
    assert found == {False: [1], True: [0]}


@pytest.mark.interpreter
def test_what_is_launched_as_in_a_compiled_step_is_right() -> None:
    op, implementation = get_op("cross_entropy"), get_implementation("cross_entropy", "triton")
    with as_in_compiled_step(), seen_launches() as seen:
        verdict = verify(
            op, implementation, load_function("cross_entropy", implementation), [], CPU, dtype=torch.float32,
            cases=("odd vocabulary", "past a block"),
        )  # fmt: skip
    assert verdict.status == "verified", verdict
    assert {dict(site.at)["gradient"] for site in seen} == {0}
