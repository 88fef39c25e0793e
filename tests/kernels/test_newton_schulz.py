"""The Triton `newton_schulz`: where it takes descriptors, and matrices on which float16 could overflow or lose much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmmed.kernels.ahead_of_time import record_launches
from llmmed.kernels.base import Call, tensor_spec
from llmmed.kernels.catalog import DEFAULT, get_implementation, load_function
from llmmed.kernels.newton_schulz.reference import newton_schulz as reference
from llmmed.kernels.operator import INTERPRETED

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
        (90, (768, 2048), torch.bfloat16, {True}),
        (90, (768, 768), torch.float16, {True}),
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
