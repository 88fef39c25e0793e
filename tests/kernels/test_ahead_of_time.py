"""Every Triton implementation compiles for real GPUs, at the shapes of the shipped models, within their registers.

No GPU is needed: the kernels go through Triton and ptxas, and are not run.
"""

from __future__ import annotations

import functools
import importlib
import re
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmmed.autotune.launch_search import open_sites
from llmmed.autotune.trials import within
from llmmed.autotune.workload import record_workload
from llmmed.compose import compose
from llmmed.kernels.ahead_of_time import (
    TARGETS,
    CompiledKernel,
    Launch,
    compile_launches,
    compiling_only,
    record_launches,
    run_on_meta,
)
from llmmed.kernels.base import Call, tensor_spec
from llmmed.kernels.catalog import (
    get_implementation,
    get_op,
    implementation_names,
    load_function,
    op_folder,
    op_names,
)
from llmmed.kernels.operator import INTERPRETED, absent_gpu
from tests.kernels.hopper_code import buffers_of_stores, stores, waits_for_stores
from tests.kernels.planted import sources

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")

CANDIDATES = [(op, name) for op in op_names() for name in implementation_names(op) if name.startswith("triton")]
# Bytes that a thread may spill, both directions, in the kernels of products; all others must not spill at all.
SPILL_CEILINGS = {
    "attention_triton_bwd_kv_kernel": 380,
    "rotary_attention_triton_bwd_kv_kernel": 176,
    "linear_cross_entropy_triton_fwd_kernel": 32,
}


def targets(op: str) -> set[int]:
    """All, but for attention, whose loops and launches are those of rotary_attention: an H100. And an L40S has nothing
    that these kernels would use and an A40 lacks: one op is enough there."""
    if op == "attention":
        return {90}
    return set(TARGETS) if op == "rotary_attention" else set(TARGETS) - {89}


@functools.cache
def production_calls() -> dict[str, list[Call]]:
    """What the base and large models call in bf16 on one 80 GB GPU, Muon's step included."""
    calls: dict[Call, None] = {}
    for size, batch_size, seq_len in (("base", 32, 1024), ("large", 8, 2048)):
        config = compose(
            [
                f"model={size}", "data=synthetic", "optimizer=muon", "tokenizer.vocab_size=49152",
                "train.precision=bf16", f"train.micro_batch_size={batch_size}", f"train.seq_len={seq_len}",
                f"train.global_batch_tokens={batch_size * seq_len}",
            ]
        )  # fmt: skip
        calls |= dict.fromkeys(record_workload(config).calls)
    by_op: dict[str, list[Call]] = {op: [] for op in op_names()}
    for call in calls:
        by_op[call.op].append(call)
    return by_op


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_compile_for_every_target_and_do_not_spill() -> None:
    """In one test, so that what is launched in several ways is compiled once, by processes that start once."""
    shipped, searched, far, grouped = shipped_launches(), searched_launches(), far_launches(), grouped_launches()
    launches = [*shipped, *searched, *far, *grouped]
    compiled = dict(zip(launches, compile_launches(launches), strict=True))
    for op, name in CANDIDATES:
        found = {compiled[launch].target for launch in shipped if (launch.op, launch.implementation) == (op, name)}
        assert found == targets(op), (op, name)
    assert len({compiled[launch].constants for launch in searched}) > 30
    assert {launch.kernel for launch in far} >= set(get_implementation("attention", "triton").kernel_names)
    assert all("LONG=True" in compiled[launch].constants for launch in far)
    judged = (*shipped, *searched, *grouped)
    spilling = [compiled[k] for k in judged if compiled[k].spills > SPILL_CEILINGS.get(k.kernel, 0)]
    too_large = [kernel for kernel in compiled.values() if not kernel.fits]
    assert not spilling + too_large, "\n".join(kernel.describe() for kernel in spilling + too_large)
    assert_products_run_beside_each_other_and_nothing_leaves_unfinished(compiled.values())


def assert_products_run_beside_each_other_and_nothing_leaves_unfinished(compiled: Iterable[CompiledKernel]) -> None:
    """In the kernels for Hopper, whose warps have tasks of their own."""
    found: dict[str, set[tuple[int, str]]] = {}
    for kernel in compiled:
        if kernel.code:
            assert kernel.registers == 168, kernel.describe()
            assert not kernel.serialized, kernel.describe()
            code = kernel.code["ttgir"]
            waits = "".join(map(str, waits_for_stores(code)))
            found.setdefault(kernel.kernel, set()).add((stores(code), waits))
            # Data does not go through shared memory where a layout should do, nor by single elements.
            assert "swiglu_mlp_hopper_bwd" not in kernel.kernel or "convert_layout" not in code
            assert "rotary" in kernel.kernel or "st.shared.b16" not in kernel.code["ptx"]
            if kernel.kernel in ("swiglu_mlp_hopper_fwd_kernel", "linear_cross_entropy_hopper_fwd_kernel"):
                # What waits for the next tile is named anew; the compiler has been asked to refuse if it moves.
                renamed = [line for line in code.splitlines() if "ttg.convert_layout" in line]
                parts = r": tensor<64x64x\w+, #ttg\.slice<.*> -> tensor<64x64x\w+, #mma\d*>"
                assert all(re.search(parts, line) for line in renamed), renamed
                assert len(renamed) <= 2 * 3
                left_from = buffers_of_stores(code)  # each group's two by turns, from one tile to the next
                assert left_from[: len(left_from) // 2] == left_from[len(left_from) // 2 :]
                assert re.fullmatch("(10)*1?|(01)*", left_from[: len(left_from) // 2]), left_from
            if "newton_schulz" in kernel.kernel:
                assert "stmatrix.sync.aligned.m8n8.x4.trans" in kernel.code["ptx"]
    # All twice, for two groups.
    assert found == {
        # Three parts beside the next tile's sum, three at once, three at the end; one buffer of two is on its way. Of a
        # short sum all six at once.
        "swiglu_mlp_hopper_fwd_kernel": {(2 * 9, 2 * "1111111110"), (2 * 6, 2 * "1111110")},
        # Likewise three, one, and three; or four; nothing where only sums are wanted.
        "linear_cross_entropy_hopper_fwd_kernel": {(2 * 7, 2 * "11111110"), (2 * 4, 2 * "11110"), (0, 2 * "0")},
        # A quarter's two. A third result goes by way of one of these, which must have been read before its own gradient
        # is written there.
        "swiglu_mlp_hopper_bwd_kernel": {(2 * 8, 2 * "2220"), (2 * 12, 2 * "11212120")},
        # Eight parts beside and after the sum of a wide tile, eight of a narrow one, and six at the end. What a buffer
        # held has left; a mirrored part may leave the one before on its way.
        "newton_schulz_hopper_fwd_kernel": {(2 * (8 + 8 + 6), 2 * (11 * "01" + "0"))},
        # Queries and the output; then both halves of the queries' gradient, or of keys' and of values'. A buffer is
        # free when all that was stored from it has left, which is seen to in the next block, and after the last. Both
        # halves of a narrow head leave at once.
        "rotary_attention_hopper_fwd_kernel": {(2 * 2, 2 * "00")},
        "rotary_attention_hopper_bwd_q_kernel": {(2 * 2, 2 * "00"), (2 * 1, 2 * "00")},
        "rotary_attention_hopper_bwd_kv_kernel": {(2 * 4, 2 * "00"), (2 * 2, 2 * "00")},
    }


def shipped_launches() -> list[Launch]:
    """Those at the calls of the shipped models."""
    launches = []
    for op, name in CANDIDATES:
        calls = production_calls()[op]
        base, large = calls[: len(calls) // 2], calls[len(calls) // 2 :]
        launches += record_launches(op, name, calls, targets=[90])
        # Elsewhere base alone, to save minutes. Attention has tiles of its own for large's heads, and others
        # where there is less shared memory.
        launches += record_launches(op, name, base, targets=[target for target in targets(op) if target != 90])
        if op in ("swiglu_mlp", "linear_cross_entropy"):  # sums that are too short to store beside
            launches += record_launches(op, name, [narrow(op)], targets=[90])
        if op == "swiglu_mlp":  # on an H100 what hidden units in whole blocks of 128 do without
            launches += record_launches(op, name, [unaligned(base[0]), unaligned(large[0])], targets=[90])
            # In large's width backward writes a third result.
            launches += record_launches(op, name, large, targets=[86, 100])
        if op == "rotary_attention":
            launches += record_launches(op, name, large, targets=[86])
            # On an H100 what lengths in whole blocks of 128 do without.
            launches += record_launches(op, name, [positions(base[0], -64)], targets=[90])
            # Of the heads that are narrower than their tiles, those of small.
            launches += record_launches(op, name, [with_heads_of(48, base[0])], targets=[90])
        if "rms_norm" in op:  # whose pipelines take twice the shared memory in float32
            launches += record_launches(op, name, [in_float32(base[0])], targets=[86])
    return launches


def narrow(op: str) -> Call:
    """A call whose model is 128 wide, in bfloat16."""
    x = tensor_spec(300, 128, dtype=torch.bfloat16, requires_grad=True)
    if op == "swiglu_mlp":
        shapes = ((512, 128), (128, 256))
        gate_up, down = (tensor_spec(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        return Call.of(op, x=x, gate_up_weight=gate_up, down_weight=down)
    weight = tensor_spec(700, 128, dtype=torch.float32, requires_grad=True)
    targets = tensor_spec(300, dtype=torch.int64)
    return Call.of(op, hidden_states=x, weight=weight, targets=targets, ignore_index=-100, scale=None)


def in_float32(call: Call) -> Call:
    """The same call with every tensor of the compute dtype in float32 instead."""
    narrow = {name: spec for name, spec in call.tensors.items() if spec.dtype == call.compute_dtype}
    wide = {name: replace(spec, dtype=torch.float32) for name, spec in narrow.items()}
    return Call.of(call.op, **{**dict(call.arguments), **wide})


def unaligned(call: Call) -> Call:
    """A call of `swiglu_mlp` with sixteen hidden units more."""
    d_model, d_ff = call.spec("down_weight").shape
    shapes = {"gate_up_weight": (2 * d_ff + 32, d_model), "down_weight": (d_model, d_ff + 16)}
    weights = {n: tensor_spec(*shape, dtype=torch.bfloat16, requires_grad=True) for n, shape in shapes.items()}
    return Call.of("swiglu_mlp", x=call.spec("x"), **weights)


def positions(call: Call, more: int, groups: int = 1) -> Call:
    """A call of `rotary_attention` with more positions, or fewer, and a head of keys for so many of queries."""
    batch, seq, _, head_dim = call.spec("qkv").shape
    heads = call["n_heads"] + 2 * call["n_heads"] // groups
    qkv = tensor_spec(batch, seq + more, heads, head_dim, dtype=torch.bfloat16, requires_grad=True)
    table = tensor_spec(seq + more, head_dim // 2, dtype=torch.float32)
    return Call.of("rotary_attention", qkv=qkv, cos=table, sin=table, n_heads=call["n_heads"])


def with_heads_of(head_dim: int, call: Call) -> Call:
    """A call of `rotary_attention` with heads of another size."""
    qkv = tensor_spec(*call.spec("qkv").shape[:3], head_dim, dtype=torch.bfloat16, requires_grad=True)
    table = tensor_spec(call.spec("cos").shape[0], head_dim // 2, dtype=torch.float32)
    return Call.of("rotary_attention", qkv=qkv, cos=table, sin=table, n_heads=call["n_heads"])


def grouped_launches() -> list[Launch]:
    """Of `rotary_attention` with grouped queries, on an H100."""
    large = production_calls()["rotary_attention"][-1]
    launches = record_launches("rotary_attention", "triton", [positions(large, 0, groups=4)], targets=[90])
    return [launch for launch in launches if "hopper" in launch.kernel]


def searched_launches() -> list[Launch]:
    """Every other one that a search on an H100 may choose, at a call of each op. A search leaves out what cannot be
    launched, and kernels of products take a minute: none of attention's."""
    return [
        launch
        for op, name in CANDIDATES
        if "attention" not in op
        for call in production_calls()[op][:1]
        for launch in alternative_launches(op, name, call)[::2]
    ]


def alternative_launches(op_name: str, name: str, call: Call) -> list[Launch]:
    op, implementation = get_op(op_name), get_implementation(op_name, name)
    found: list[Launch] = []
    with absent_gpu(TARGETS[90]):
        opened = open_sites(op, implementation, load_function(op_name, implementation), [call], torch.device("cpu"))
    assert opened
    for each in opened:
        for values in each.alternatives:
            implementation.take_launches({each.site: values})
            found += record_launches(op_name, name, [call], targets=[90])
            implementation.take_launches({})
    return found


def launched_anywhere(op: str, name: str) -> list[Launch]:
    """At the shipped calls on an H100; where that has kernels of its own, also where they do not do."""
    elsewhere = [86] if (op_folder(op) / "hopper.py").exists() else []
    return record_launches(op, name, production_calls()[op], targets=[90, *elsewhere])


def far_launches() -> list[Launch]:
    """Attention's where positions are 2^31 elements apart: strides of 64 bits make other kernels of it."""
    states = tensor_spec(1, 2**16, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    states = replace(states, stride=(2**32, 2**16, 64, 1))
    return record_launches("attention", "triton", [Call.of("attention", q=states, k=states, v=states)], targets=[90])


@pytest.mark.parametrize("op", sorted({op for op, _ in CANDIDATES}))
def test_no_kernel_of_an_op_is_left_out(op: str) -> None:
    modules = [importlib.import_module(f"llmmed.kernels.{op}.{stem}") for stem in sources(op) if stem != "loops"]
    defined = {name for module in modules for name, value in vars(module).items()
               if name.endswith("_kernel") and getattr(value, "__module__", "") == module.__name__}  # fmt: skip
    own = {module.__name__ for module in modules}
    assert defined
    assert {launch.kernel for launch in launched_anywhere(op, "triton") if launch.module in own} == defined


def test_attention_s_loops_scale_with_the_subtraction_and_mask_no_whole_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    states = tensor_spec(1, 128, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    call = Call.of("attention", q=states, k=states, v=states)
    made = {}
    for launch in record_launches("attention", "triton", [call], targets=[90]):
        if launch.kernel in ("attention_triton_fwd_kernel", "attention_triton_bwd_kv_kernel"):
            kernel = getattr(importlib.import_module(launch.module), launch.kernel)
            source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
            made[launch.kernel] = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options).asm
    forward, keys = made["attention_triton_fwd_kernel"]["ptx"], made["attention_triton_bwd_kv_kernel"]["ttir"]
    exponentials, fused = (len(re.findall(rf"\b{op}", forward)) for op in ("ex2.approx", "fma.rn.f32"))
    assert 0 < exponentials <= fused
    assert "tt.load" in keys
    assert not re.search(r"tt\.load [^:\n]*,", keys)


def test_every_kernel_that_a_trace_is_searched_for_is_launched() -> None:
    for op, name in CANDIDATES:
        launched = {launch.kernel for launch in launched_anywhere(op, name)}
        expected = get_implementation(op, name).kernel_names
        assert all(any(part in kernel for kernel in launched) for part in expected), (op, name, launched)


@pytest.mark.parametrize(("op_name", "name"), CANDIDATES)
def test_what_a_search_finds_can_be_proved_with_fewer_rows(op_name: str, name: str) -> None:
    """The gate takes fewer rows of a large call, and believes only in launches that it has made."""
    op, implementation = get_op(op_name), get_implementation(op_name, name)
    call = production_calls()[op_name][-1]
    smaller = within(op, call, 2**24)
    assert smaller != call or "newton_schulz" in op_name
    with absent_gpu(TARGETS[90]):
        function = load_function(op_name, implementation)
        found = [open_sites(op, implementation, function, [each], torch.device("cpu")) for each in (call, smaller)]
    assert [each.site for each in found[0]] == [each.site for each in found[1]]


def test_a_kernel_that_needs_too_many_registers_is_seen_to_spill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check can fail: 1,024 values a thread cannot stay in 255 registers."""
    (tmp_path / "planted_greedy_kernel.py").write_text(
        textwrap.dedent("""
        import triton
        import triton.language as tl

        @triton.jit
        def greedy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
            cols = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + cols)
            tl.store(y_ptr + cols, x * tl.sum(x, axis=0))
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"}
    launch = Launch(
        "planted", "triton", 90, "planted_greedy_kernel", "greedy_kernel", "key", signature, {(2,): 32768}, {},
        {"num_warps": 1},
    )  # fmt: skip
    (kernel,) = compile_launches([launch], processes=1)
    assert kernel.spills > 0


KERNELS_OF_RMS_NORM = {"rms_norm_triton_fwd_kernel", "rms_norm_triton_bwd_kernel", "norm_weight_gradient_kernel"}


def test_launches_follow_the_shape_and_are_told_apart() -> None:
    def call(width: int) -> Call:
        x = tensor_spec(1024, width, dtype=torch.bfloat16, requires_grad=True)
        return Call.of("rms_norm", x=x, weight=tensor_spec(width, dtype=torch.float32, requires_grad=True), eps=1e-6)

    one = record_launches("rms_norm", "triton", [call(256)], targets=[90])
    assert {launch.kernel for launch in one} == KERNELS_OF_RMS_NORM
    assert record_launches("rms_norm", "triton", [call(256), call(256)], targets=[90]) == one
    assert len(record_launches("rms_norm", "triton", [call(256), call(512)], targets=[90])) == 6
    assert len(record_launches("rms_norm", "triton", [call(256)], targets=[80, 90])) == 6


class Driver:
    """A GPU as far as compiling asks for one; `launchers` names the kernels for which one was made."""

    def __init__(self) -> None:
        self.launchers: list[str] = []

    def launcher_cls(self, source: ASTSource, metadata: object) -> None:
        self.launchers.append(source.name)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def test_a_launch_that_only_compiles_leaves_its_kernel_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs
    from triton.runtime.driver import driver

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    gpu = Driver()
    monkeypatch.setattr(driver, "_active", gpu)
    with compiling_only(torch.device("cpu")):
        function = load_function("rms_norm", get_implementation("rms_norm", "triton"))
        call = next(iter(get_op("rms_norm").cases(torch.bfloat16).values()))
        for _ in range(2):
            run_on_meta(get_op("rms_norm"), function, call)
    compiled = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert compiled == KERNELS_OF_RMS_NORM
    assert sorted(gpu.launchers) == sorted(KERNELS_OF_RMS_NORM)
