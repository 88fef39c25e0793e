"""The Triton `rotary_attention`: which kernels it launches where, and its kernels for Hopper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmmed.autotune.launch_search import open_sites
from llmmed.autotune.verify import poisoned_memory, verify
from llmmed.kernels import operator
from llmmed.kernels.ahead_of_time import TARGETS, launching_nothing, record_launches, run_on_meta
from llmmed.kernels.base import Call, tensor_spec
from llmmed.kernels.catalog import DEFAULT, get_implementation, get_op, load_function
from llmmed.kernels.operator import INTERPRETED, absent_gpu
from llmmed.kernels.rotary_attention import hopper_backward, hopper_forward, triton_impl
from llmmed.kernels.rotary_attention.reference import rotary_attention as reference
from llmmed.kernels.rotary_attention.triton_impl import LOOPS, SPECIALISED, rotary_attention
from tests.kernels.planted import bugs, mutant

compiled = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")


def call_of(
    batch: int, seq: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> Call:
    qkv = tensor_spec(batch, seq, n_heads + 2 * n_kv_heads, head_dim, dtype=dtype, requires_grad=True)
    table = tensor_spec(seq, head_dim // 2, dtype=torch.float32)
    return Call.of("rotary_attention", qkv=qkv, cos=table, sin=table, n_heads=n_heads)


def in_a_wider_tensor(call: Call) -> Call:
    qkv = call.spec("qkv")
    batch_stride, row, head_stride, _ = qkv.stride
    wider = replace(qkv, stride=(batch_stride * 2, row * 2, head_stride, 1))
    return Call.of("rotary_attention", qkv=wider, cos=call.spec("cos"), sin=call.spec("sin"), n_heads=call["n_heads"])


@compiled
@pytest.mark.parametrize(
    ("call", "target", "kind"),
    [
        (call_of(2, 1024, 12, 12, 64), 90, "hopper"),
        (call_of(2, 384, 8, 2, 128, torch.float16), 90, "hopper"),
        (call_of(2, 1024, 12, 12, 64), 100, "triton"),
        (call_of(2, 1024, 12, 12, 64), 86, "triton"),
        (call_of(2, 1024, 12, 12, 64, torch.float32), 90, "triton"),
        (call_of(2, 1000, 12, 12, 64), 90, "triton"),
        (call_of(2, 512, 8, 8, 48), 90, "hopper"),
        (call_of(2, 512, 8, 8, 80), 90, "hopper"),
        (call_of(2, 512, 8, 8, 56), 90, "triton"),  # halves of 56 bytes, and the hardware copies multiples of 16
        (call_of(2, 512, 8, 8, 32), 90, "triton"),
        (in_a_wider_tensor(call_of(2, 1024, 12, 12, 64)), 90, "triton"),
    ],
)
def test_hopper_has_kernels_of_its_own_for_whole_blocks(call: Call, target: int, kind: str) -> None:
    launched = {launch.kernel for launch in record_launches("rotary_attention", "triton", [call], targets=[target])}
    of_products = {f"rotary_attention_{kind}_{which}_kernel" for which in ("fwd", "bwd_q", "bwd_kv")}
    assert launched == of_products | {"rotary_attention_triton_keys_kernel"}


@compiled
def test_a_search_may_take_the_loops_in_either_pass() -> None:
    """With few sequences Hopper's long programs leave multiprocessors idle."""
    implementation, device = get_implementation("rotary_attention", "triton"), torch.device("cpu")
    call = call_of(2, 2048, 16, 4, 128)
    with absent_gpu(TARGETS[90]):
        opened = open_sites(get_op("rotary_attention"), implementation, rotary_attention, [call], device)
    assert [(dict(each.site.at), each.backward) for each in opened] == [
        ({"head_dim": 128, "itemsize": 2, "seq": 2048, "group": 4}, backward) for backward in (False, True)
    ]
    kernels = {False: {"fwd"}, True: {"bwd_q", "bwd_kv"}}
    for each in opened:
        assert (each.default, each.alternatives) == ({"how": SPECIALISED}, [{"how": LOOPS}])
        implementation.take_launches({each.site: {"how": LOOPS}})
        try:
            launches = record_launches("rotary_attention", "triton", [call], targets=[90])
        finally:
            implementation.take_launches({})
        found = {launch.kernel for launch in launches} - {"rotary_attention_triton_keys_kernel"}
        assert found == {f"rotary_attention_triton_{which}_kernel" for which in kernels[each.backward]} | {
            f"rotary_attention_hopper_{which}_kernel" for which in kernels[not each.backward]
        }


@compiled
@pytest.mark.parametrize(("offset", "path"), [(0, ["hopper"]), (1, []), (8, ["hopper"])])
def test_a_gradient_that_arrives_at_an_odd_address_takes_the_other_kernels(
    offset: int, path: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(triton_impl, "differentiate", lambda *_: taken.append("hopper"))
    with absent_gpu(TARGETS[90]), launching_nothing(torch.device("meta")):
        call = call_of(1, 256, 2, 2, 64)
        run_on_meta(get_op("rotary_attention"), rotary_attention, call, lambda out: moved(out, offset))
    assert taken == path


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
class TestOnHopper:
    """Warps that wait for each other: each ring must go around more than twice, and end anywhere."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("programs", [1, 2, 3, 7])
    @pytest.mark.parametrize(
        ("batch", "seq", "n_heads", "n_kv_heads", "head_dim"),
        [
            (1, 128, 1, 1, 64),
            (2, 256, 2, 2, 128),
            (1, 384, 4, 2, 128),
            (3, 640, 2, 1, 64),
            (1, 1280, 6, 2, 64),
            (3, 640, 4, 2, 48),
            (1, 384, 3, 3, 48),
            (2, 512, 4, 2, 80),
            (1, 256, 2, 2, 112),
        ],
    )
    def test_it_is_right_however_many_blocks_a_program_takes(
        self, batch: int, seq: int, n_heads: int, n_kv_heads: int, head_dim: int, programs: int, dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        for module in (hopper_forward, hopper_backward):
            monkeypatch.setattr(module, "programs", lambda device, tasks: programs)
        call = call_of(batch, seq, n_heads, n_kv_heads, head_dim, dtype)
        for regime in get_op("rotary_attention").regimes:
            assert_right(call, regime)

    @pytest.mark.parametrize(
        "shape", [(8, 2048, 16, 16, 128), (32, 1024, 12, 12, 64), (48, 512, 8, 8, 48), (2, 8192, 16, 4, 128)]
    )
    def test_a_whole_gpu_gives_the_same_bits_every_time(self, shape: tuple[int, ...]) -> None:
        call = call_of(*shape)
        first = assert_right(call, "bland") if shape[1] <= 2048 else differentiated(call, "bland")
        for _ in range(10):
            assert all(map(torch.equal, first, differentiated(call, "bland")))

    def test_gradients_that_arrive_anywhere_give_the_same(self) -> None:
        """At an odd address by the kernels that run everywhere."""
        call = call_of(2, 256, 4, 2, 64)
        here, there = (differentiated(call, "bland", offset=offset) for offset in (0, 1))
        assert torch.equal(here[0], there[0])
        assert error(there[1], here[1].double()) < 0.01

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_without_a_bug_it_is_accepted(self, dtype: torch.dtype) -> None:
        op, implementation = get_op("rotary_attention"), get_implementation("rotary_attention", "triton")
        calls = [call_of(2, 512, 4, 2, head_dim, dtype) for head_dim in (128, 64, 48)]
        verdict = verify(op, implementation, rotary_attention, calls, torch.device("cuda"))
        assert verdict.status == "verified", verdict

    @pytest.mark.parametrize("bug", bugs("rotary_attention", "HOPPER_BUGS"))
    def test_a_planted_bug_is_rejected(self, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = operator.gpu_of(torch.device("cuda"))
        monkeypatch.setattr(operator, "gpu_of", lambda device: gpu._replace(multiprocessors=3))
        _, function = mutant("rotary_attention", bug, tmp_path, "HOPPER_BUGS")
        op, implementation = get_op("rotary_attention"), get_implementation("rotary_attention", "triton")
        # Several tasks a program.
        calls = [call_of(2, 384, 4, 2, 64), call_of(2, 640, 2, 2, 128), call_of(2, 384, 4, 2, 48)]
        verdict = verify(op, implementation, function, calls, torch.device("cuda"))
        assert verdict.status == "wrong", verdict


def assert_right(call: Call, regime: str) -> list[Tensor]:
    """Not further from float64 than PyTorch is by more than half, in the output and each part of the gradient. Returns
    the output and the gradient."""
    found = differentiated(call, regime)
    default = load_function("rotary_attention", get_implementation("rotary_attention", DEFAULT))
    theirs, exact = differentiated(call, regime, default), differentiated(call, regime, reference, torch.float64)
    heads = call.spec("qkv").shape[2] - call["n_heads"]
    parts = (call["n_heads"], heads // 2, heads // 2)
    for ours, other, right in zip(
        *(([out, *grad.split(parts, 2)]) for out, grad in (found, theirs, exact)), strict=True
    ):
        assert error(ours, right) <= 1.5 * error(other, right) + 1e-4
    return found


def differentiated(
    call: Call, regime: str, function: object = rotary_attention, dtype: torch.dtype | None = None, offset: int = 0
) -> list[Tensor]:
    """The output and the gradient of the projection, for inputs and an arriving gradient that depend on the call. The
    latter lies so many elements into its memory."""
    device = torch.device("cuda")
    given = get_op("rotary_attention").make_inputs(call, regime, torch.Generator(device).manual_seed(0), device)
    qkv = given["qkv"].detach()
    generator = torch.Generator(device).manual_seed(1)
    shape = (*qkv.shape[:2], call["n_heads"], qkv.shape[3])
    arriving = torch.randn(shape, generator=generator, device=device).to(qkv.dtype)
    tables = [given["cos"], given["sin"]]
    if dtype is not None:
        qkv, arriving, *tables = (tensor.to(dtype) for tensor in (qkv, arriving, *tables))
    leaf = qkv.requires_grad_()
    with poisoned_memory():
        out = function(leaf, *tables, call["n_heads"])  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, leaf, moved(arriving, offset))]


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def moved(tensor: Tensor, offset: int) -> Tensor:
    """The same, contiguous, so many elements into memory of its own."""
    memory = tensor.new_empty(tensor.numel() + offset)
    memory[offset:].copy_(tensor.reshape(-1))
    return memory[offset:].view(tensor.shape)
