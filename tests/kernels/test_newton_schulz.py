"""The Triton `newton_schulz`: where it takes descriptors and Hopper's kernel, and that one; matrices on which float16
could overflow or lose much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmmed.autotune.verify import poisoned_memory, verify
from llmmed.kernels.ahead_of_time import TARGETS, record_launches
from llmmed.kernels.base import Call, tensor_spec
from llmmed.kernels.catalog import DEFAULT, get_implementation, get_op, load_function
from llmmed.kernels.newton_schulz import hopper, triton_impl
from llmmed.kernels.newton_schulz.reference import newton_schulz as reference
from llmmed.kernels.newton_schulz.triton_impl import SPECIALISED, TILES
from llmmed.kernels.operator import INTERPRETED, Gpu, absent_gpu
from llmmed.kernels.tunable import seen_launches
from tests.kernels.planted import bugs, mutant

SHAPES = [(48, 48), (24, 96), (33, 97)]  # the iteration itself; on the Gram matrix; on that without descriptors
HOSTILE = ["zeros", "ones", "identity", "one entry", "rank one", "equal rows", "decaying", "huge", "tiny"]


def matrix(kind: str, rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made = {
        "zeros": torch.zeros(rows, cols),
        "ones": torch.ones(rows, cols),
        "identity": torch.eye(rows, cols),
        "one entry": torch.zeros(rows, cols).index_fill(0, torch.tensor(1), 3.0).tril(1).triu(1),
        "rank one": normal(rows, 1) @ normal(1, cols),
        "equal rows": normal(1, cols).expand(rows, cols) + 1e-3 * normal(rows, cols),
        "decaying": torch.linalg.qr(normal(rows, rows))[0] * torch.logspace(0, -5, rows)
        @ torch.linalg.qr(normal(cols, rows))[0].mT,
        "huge": 1e4 * normal(rows, cols),
        "tiny": 1e-4 * normal(rows, cols),
    }  # fmt: skip
    return made[kind][None]


def assert_no_worse_than_the_default(kind: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    G = matrix(kind, *shape).to(dtype)
    truth = reference(G.double())
    found = load_function("newton_schulz", get_implementation("newton_schulz", "triton"))(G.to(device)).cpu()
    default = load_function("newton_schulz", get_implementation("newton_schulz", DEFAULT))(G.to(device)).cpu()
    assert found.isfinite().all()
    # A whole bfloat16 eps, also of a float16 result: matrices on which all roundings agree are worth no slower kernel.
    free = torch.finfo(torch.bfloat16).eps * truth.norm()
    assert (found - truth).norm() <= 2 * (default - truth).norm() + free


@pytest.mark.skipif(INTERPRETED, reason="nothing is recorded under TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("target", "shape", "dtype", "through_descriptors"),
    [
        (90, (384, 1536), torch.bfloat16, {True}),
        (90, (520, 520), torch.float16, {True}),
        (100, (40, 88), torch.bfloat16, {True}),
        (80, (768, 2048), torch.bfloat16, {False}),
        (89, (768, 768), torch.bfloat16, {False}),
        (90, (768, 768), torch.float32, {False}),
        (90, (33, 97), torch.bfloat16, {False}),
        (90, (130, 40), torch.bfloat16, {True, False}),  # rows of 260 bytes, and 40 x 40 Gram matrices
    ],
)
def test_descriptors_are_taken_where_the_hardware_has_them(
    target: int, shape: tuple[int, int], dtype: torch.dtype, through_descriptors: set[bool]
) -> None:
    call = Call.of("newton_schulz", G=tensor_spec(2, *shape, dtype=dtype))
    launches = record_launches("newton_schulz", "triton", [call], targets=[target])
    products = [launch for launch in launches if launch.kernel == "newton_schulz_triton_fwd_kernel"]
    position = list(products[0].signature).index("DESCRIPTORS")
    assert {launch.constants[(position,)] for launch in products} == through_descriptors


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_matrices(kind: str, shape: tuple[int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert_no_worse_than_the_default(kind, shape, dtype, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0)])
def test_no_matrices(shape: tuple[int, ...]) -> None:
    found = load_function("newton_schulz", get_implementation("newton_schulz", "triton"))(torch.empty(shape))
    assert found.shape == shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (384, 384), (768, 2048)])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_matrices_on_a_gpu(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_no_worse_than_the_default(kind, shape, dtype, "cuda")


@pytest.mark.skipif(INTERPRETED, reason="Hopper's kernel is not interpreted")
@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("gpu", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    ("size", "inner", "fits", "large"),
    [(2048, 5632, 1, 1), (512, 512, 1, 1), (384, 384, 1, 0), (256, 256, 0, 0), (640, 1120, 0, 1), (576, 1152, 0, 1)],
)
def test_hopper_has_a_kernel_of_its_own_for_many_whole_tiles(
    size: int, inner: int, fits: int, large: int, gpu: Gpu, itemsize: int, descriptors: int
) -> None:
    shape = {"size": size, "inner": inner, "itemsize": itemsize, "descriptors": descriptors}
    meta = torch.device("meta")
    with absent_gpu(gpu):
        default = triton_impl._launch(meta, **shape)
        others = {launch.how for launch in triton_impl._alternatives(meta, **shape)}
    possible = fits and gpu.capability == 90 and itemsize == 2 and descriptors
    assert default.how == (SPECIALISED if possible and large else TILES)
    assert (SPECIALISED in others) == bool(possible)
    assert (TILES in others) == (itemsize == 2)


@pytest.mark.parametrize("side", range(1, 20))
def test_a_program_takes_its_share_of_tiles(side: int) -> None:
    """As many as there are: two blocks at a time in each row of the lower triangle."""
    out = torch.empty((1, 128 * side, 128 * side), dtype=torch.float16, device="meta")
    with absent_gpu(Gpu(10**6, 2**20, 2**16, 90)):
        assert hopper.programs(out) == sum(row // 2 + 1 for row in range(side))
    with absent_gpu(TARGETS[90]):
        assert hopper.programs(out) <= TARGETS[90].multiprocessors


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
class TestOnHopper:
    """Warps that wait for each other: the ring must go around more than twice, and end anywhere."""

    @pytest.mark.parametrize("added", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("programs", [1, 2, 3, 7])
    @pytest.mark.parametrize(("n", "size", "inner"), [(1, 128, 384), (5, 128, 448), (3, 256, 512), (2, 640, 1152)])
    def test_it_is_right_however_many_tiles_a_program_takes(
        self, n: int, size: int, inner: int, programs: int, dtype: torch.dtype, added: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(hopper, "programs", lambda out: programs)
        left, right, add = drawn(n, size, inner, dtype)
        with poisoned_memory():
            out = torch.empty_like(add)
            hopper.symmetric_product(left, right, add if added else None, out, 0.5, 0.75, 2.0)
        exact = 0.5 * left.double() @ right.double().mT + 2.0 * torch.eye(size, device="cuda")
        exact += 0.75 * add.double() if added else 0.0
        # Rounded once: half an eps of the dtype.
        assert ((out - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-4).all()
        assert torch.equal(out, out.mT)

    @pytest.mark.parametrize("shape", [(48, 768, 768), (36, 768, 2048), (16, 2048, 2048)])
    def test_a_whole_gpu_is_right_and_gives_the_same_bits_every_time(self, shape: tuple[int, int, int]) -> None:
        G = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda", dtype=torch.bfloat16)
        newton_schulz = load_function("newton_schulz", get_implementation("newton_schulz", "triton"))
        with seen_launches() as launches, poisoned_memory():
            first = newton_schulz(G)
            for _ in range(10):
                assert torch.equal(newton_schulz(G), first)
        assert {values["how"] for values in launches.values() if "how" in values} == {SPECIALISED}
        truth = reference(G[:4].double())
        assert (first[:4] - truth).norm() <= 0.01 * truth.norm()

    @pytest.mark.parametrize("bug", bugs("newton_schulz", "HOPPER_BUGS"))
    def test_a_planted_bug_is_rejected(self, bug: str, tmp_path: Path) -> None:
        implementation, function = mutant("newton_schulz", bug, tmp_path, "HOPPER_BUGS")
        verdict = verify(get_op("newton_schulz"), implementation, function, many_tiles(), torch.device("cuda"))
        assert verdict.status == "wrong", verdict

    def test_without_a_bug_it_is_accepted(self) -> None:
        op, implementation = get_op("newton_schulz"), get_implementation("newton_schulz", "triton")
        verdict = verify(op, implementation, implementation.load(), many_tiles(), torch.device("cuda"))
        assert verdict.status == "verified", verdict


def many_tiles() -> list[Call]:
    """More than there are multiprocessors, in the iteration itself and in that on the Gram matrix."""
    shapes = [(24, 640, 640), (24, 640, 1280)]
    return [Call.of("newton_schulz", G=tensor_spec(*shape, dtype=torch.bfloat16)) for shape in shapes]


def drawn(n: int, size: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two matrices whose product is symmetric, and what is added: integers, so that sums are exact."""
    generator = torch.Generator("cuda").manual_seed(size)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator, device="cuda", dtype=dtype)

    left, add = whole(n, size, inner), whole(n, size, size)
    # The same columns in both, by signs that differ from column to column.
    return left, left * (1 - 2 * (torch.arange(inner, device="cuda") % 3 == 0).to(dtype)), add.tril() + add.tril(-1).mT
