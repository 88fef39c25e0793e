"""`newton_schulz` in Triton: X X^T and its square are symmetric, so half of their tiles are computed and mirrored.

The third product of an iteration has no such symmetry and goes to cuBLAS.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmed.kernels.base import Implementation
from llmmed.kernels.newton_schulz.reference import COEFFICIENTS, EPSILON, STEPS
from llmmed.kernels.operator import TRITON_DEVICES, require_triton
from llmmed.kernels.tunable import Tunable


class Launch(NamedTuple):
    """Tile sides and resources of the symmetric product."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def newton_schulz_triton_fwd_kernel(
    x_ptr, add_ptr, out_ptr, x_batch, x_row, x_col, size, inner,
    ALPHA: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Program t owns tile (i, j) of the lower triangle, counted row by row.
    tile = tl.program_id(0)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    # The root is rounded: one correction either way makes the index exact.
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2

    batch = tl.program_id(1).to(tl.int64)
    rows, cols = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    ks = tl.arange(0, BLOCK_K)
    x_ptr += batch * x_batch
    left = x_ptr + rows.to(tl.int64)[:, None] * x_row + ks[None, :] * x_col
    right = x_ptr + cols.to(tl.int64)[None, :] * x_row + ks[:, None] * x_col
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        in_k = ks < inner - start
        a = tl.load(left, mask=(rows < size)[:, None] & in_k[None, :], other=0.0)
        b = tl.load(right, mask=(cols < size)[None, :] & in_k[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        left += BLOCK_K * x_col
        right += BLOCK_K * x_col

    mask = (rows < size)[:, None] & (cols < size)[None, :]
    offsets = batch * size * size + rows.to(tl.int64)[:, None] * size + cols[None, :]
    acc *= ALPHA
    if BETA != 0.0:
        acc += BETA * tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    value = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, value, mask=mask)
    if i != j:
        mirrored = batch * size * size + cols.to(tl.int64)[:, None] * size + rows[None, :]
        tl.store(out_ptr + mirrored, tl.trans(value), mask=tl.trans(mask))


def _launch(device: torch.device, size: int, inner: int, itemsize: int) -> Launch:
    """For matrices of `size` rows."""
    if itemsize == 4:
        return Launch(32, 32, 4, 2)
    return Launch(128, 64, 8, 3) if size >= 512 else Launch(64, 64, 4, 3)


def _alternatives(device: torch.device, size: int, inner: int, itemsize: int) -> Iterator[Launch]:
    """Other tiles and pipelines; in float32, products without tensor cores, none."""
    if itemsize == 4:
        return
    yield Launch(128, 64, 8, 3) if size < 512 else Launch(64, 64, 4, 3)
    yield Launch(128, 64, 4, 3)
    yield Launch(128, 32, 8, 4) if size >= 512 else Launch(64, 64, 4, 4)
    yield Launch(64, 32, 4, 4)


_PRODUCT = Tunable("newton_schulz_triton_fwd_kernel", _launch, _alternatives)


def _symmetric_product(X: Tensor, add: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha X X^T + beta add, for `add` symmetric: [n, size, size]. Exactly symmetric."""
    n, size, inner = X.shape
    out = torch.empty((n, size, size), dtype=X.dtype, device=X.device)
    block, block_k, num_warps, num_stages = _PRODUCT(X.device, size=size, inner=inner, itemsize=X.element_size())
    side = triton.cdiv(size, block)
    newton_schulz_triton_fwd_kernel[(side * (side + 1) // 2, n)](
        X, add, out, *X.stride(), size, inner, ALPHA=alpha, BETA=beta, BLOCK=block, BLOCK_K=block_k,
        PRECISION="tf32" if X.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee",
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _forward(G: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    norm = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    X: Tensor = (G / (norm + EPSILON)).to(G.dtype).contiguous()
    tall = G.size(-2) > G.size(-1)
    for _ in range(STEPS):
        small = X.mT if tall else X
        A = _symmetric_product(small, small, 1.0, 0.0)
        B = _symmetric_product(A, A, c, b)
        # B is symmetric: B X^T transposed is X B, so that tall matrices are never turned.
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


_operator = torch.library.custom_op("llmmed::newton_schulz_triton", _forward, mutates_args=())


@_operator.register_fake
def _fake(G: Tensor) -> Tensor:
    return G.new_empty(G.shape)


def newton_schulz(G: Tensor) -> Tensor:
    """See `reference.newton_schulz`."""
    result: Tensor = _operator(G) if torch.compiler.is_compiling() else _forward(G)
    return result


def _load() -> Callable[..., Any]:
    require_triton()
    return newton_schulz


IMPL = Implementation(
    "triton",
    load=_load,
    devices=TRITON_DEVICES,
    backward=False,
    kernel_names=("newton_schulz_triton_fwd_kernel",),
    tunable=(_PRODUCT,),
)
