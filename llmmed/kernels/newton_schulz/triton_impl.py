"""`newton_schulz` in Triton: symmetric products, of which half of the tiles are computed and mirrored.

16-bit matrices are kept in float16 throughout, whose mantissa has three bits more than bfloat16's. Where a matrix is
much wider than high, the iteration is that of its small Gram matrix, and the wide one is multiplied twice instead of
five times. Products with the matrix itself have no symmetry: cuBLAS's, but for the last, which converts as it stores.

Hopper has a kernel of its own for large symmetric products, in `hopper.py`; the one here runs everywhere.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llmmed.kernels.base import Implementation
from llmmed.kernels.newton_schulz import hopper
from llmmed.kernels.newton_schulz.reference import COEFFICIENTS, EPSILON, STEPS
from llmmed.kernels.operator import (
    INTERPRETED,
    TRITON_DEVICES,
    capability,
    describable,
    input_precision,
    require_triton,
    shared_bytes,
    through_dispatcher,
)
from llmmed.kernels.tunable import Tunable

SCALE = 16.0  # of X in memory: keeps its small entries off float16's subnormal numbers
GRAM_STEPS = (3, 2)  # before X is multiplied, and the Gram matrix computed, again
assert sum(GRAM_STEPS) == STEPS


TILES, SPECIALISED = 0, 1
"""How: a kernel whose programs load and multiply by turns, a tile each; or Hopper's, whose warps have tasks of their
own."""


class Launch(NamedTuple):
    """How to compute the symmetric product; for `TILES`, a tile's sides and its resources."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int
    how: int = TILES


class DenseLaunch(NamedTuple):
    """Tile sides and resources of the last product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def newton_schulz_triton_fwd_scale_kernel(
    g_ptr, norm_ptr, x_ptr, g_batch, g_row, g_col, size, inner,
    SCALE: tl.constexpr, EPSILON: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < size)[:, None] & (cols < inner)[None, :]
    factor = SCALE / (tl.load(norm_ptr + batch) + EPSILON)
    offsets = batch * g_batch + rows.to(tl.int64)[:, None] * g_row + cols.to(tl.int64)[None, :] * g_col
    x = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * factor
    offsets = batch * size * inner + rows.to(tl.int64)[:, None] * inner + cols[None, :]
    tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def newton_schulz_triton_fwd_kernel(
    left_desc, right_desc, out_desc, left_ptr, right_ptr, add_ptr, out_ptr, size, inner, alpha, beta, diagonal,
    DESCRIPTORS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Program t owns tile (i, j) of the lower triangle, counted row by row.
    tile = tl.program_id(0)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    # The root is rounded: one correction either way makes the index exact.
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2

    batch = tl.program_id(1)
    rows, cols = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    if DESCRIPTORS:
        # What lies outside of a matrix is read as zero.
        for start in range(0, inner, BLOCK_K):
            a = left_desc.load([batch, i * BLOCK, start]).reshape(BLOCK, BLOCK_K)
            b = right_desc.load([batch, j * BLOCK, start]).reshape(BLOCK, BLOCK_K)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        ks = tl.arange(0, BLOCK_K)
        first = batch.to(tl.int64) * size * inner
        left = left_ptr + first + rows.to(tl.int64)[:, None] * inner + ks[None, :]
        right = right_ptr + first + cols.to(tl.int64)[None, :] * inner + ks[:, None]
        for start in range(0, inner, BLOCK_K):
            in_k = ks < inner - start
            a = tl.load(left, mask=(rows < size)[:, None] & in_k[None, :], other=0.0)
            b = tl.load(right, mask=(cols < size)[None, :] & in_k[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            left += BLOCK_K
            right += BLOCK_K

    mask = (rows < size)[:, None] & (cols < size)[None, :]
    first = batch.to(tl.int64) * size * size
    offsets = first + rows.to(tl.int64)[:, None] * size + cols[None, :]
    acc *= alpha
    if ADD:
        acc += beta * tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    acc += tl.where(rows[:, None] == cols[None, :], diagonal, 0.0)
    value = acc.to(out_ptr.dtype.element_ty)
    if DESCRIPTORS:
        out_desc.store([batch, i * BLOCK, j * BLOCK], value.reshape(1, BLOCK, BLOCK))
        # A tile on the diagonal needs no mirror image: it is sent past the matrix, where the hardware drops it.
        beside = tl.where(i == j, size, j * BLOCK)
        out_desc.store([batch, beside, i * BLOCK], tl.trans(value).reshape(1, BLOCK, BLOCK))
    else:
        tl.store(out_ptr + offsets, value, mask=mask)
        if i != j:
            mirrored = first + cols.to(tl.int64)[:, None] * size + rows[None, :]
            tl.store(out_ptr + mirrored, tl.trans(value), mask=tl.trans(mask))


@triton.jit
def newton_schulz_triton_fwd_dense_kernel(
    left_desc, right_desc, out_ptr, size, inner, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # GROUP rows of tiles at a time, column by column: what neighbouring programs read stays in the L2 cache.
    tile, batch = tl.program_id(0), tl.program_id(1)
    tiles_n = tl.cdiv(inner, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tl.cdiv(size, BLOCK_M) - group * GROUP, GROUP)
    i = group * GROUP + tile % (GROUP * tiles_n) % height
    j = tile % (GROUP * tiles_n) // height

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, size, BLOCK_K):
        a = left_desc.load([batch, i * BLOCK_M, start]).reshape(BLOCK_M, BLOCK_K)
        b = right_desc.load([batch, start, j * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    rows, cols = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < size)[:, None] & (cols < inner)[None, :]
    offsets = batch.to(tl.int64) * size * inner + rows.to(tl.int64)[:, None] * inner + cols[None, :]
    tl.store(out_ptr + offsets, (alpha * acc).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(device: torch.device, size: int, inner: int, itemsize: int, descriptors: int) -> Launch:
    """Of the symmetric product [size, inner] x [inner, size]."""
    launch = _tiles(size, itemsize, descriptors)
    if size >= 512 and _specialises(device, size, inner, itemsize, descriptors):  # a smaller one has few tiles
        launch = launch._replace(how=SPECIALISED)
    return launch


def _tiles(size: int, itemsize: int, descriptors: int) -> Launch:
    if itemsize == 4:
        return Launch(32, 32, 4, 2)
    if size < 512:
        return Launch(64, 64, 4, 4 if descriptors else 3)
    return Launch(128, 64, 4 if descriptors else 8, 3)


def _specialises(device: torch.device, size: int, inner: int, itemsize: int, descriptors: int) -> bool:
    fits = itemsize == 2 and hopper.takes(size, inner)
    return fits and bool(descriptors) and not INTERPRETED and capability(device) == 90


def _alternatives(device: torch.device, size: int, inner: int, itemsize: int, descriptors: int) -> Iterator[Launch]:
    """Other tiles and pipelines; in float32, products without tensor cores, none."""
    if itemsize == 4:
        return
    tiles = _tiles(size, itemsize, descriptors)
    yield tiles
    if _specialises(device, size, inner, itemsize, descriptors):
        yield tiles._replace(how=SPECIALISED)
    yield Launch(128, 64, 8, 3)
    yield Launch(128, 64, 8, 4)
    yield Launch(64, 64, 4, 4)


def _dense_launch(device: torch.device, size: int, inner: int, itemsize: int) -> DenseLaunch:
    """Of the last product [size, size] x [size, inner]."""
    if itemsize == 4:
        return DenseLaunch(32, 32, 32, 4, 2)
    wide = DenseLaunch(128, 256, 64, 8, 4)
    staged = wide.num_stages * (wide.block_m + wide.block_n) * wide.block_k * itemsize
    return wide if size >= 1024 and staged < shared_bytes(device) else DenseLaunch(128, 128, 64, 8, 3)


def _dense_alternatives(device: torch.device, size: int, inner: int, itemsize: int) -> Iterator[DenseLaunch]:
    if itemsize == 4:
        return
    yield DenseLaunch(128, 256, 64, 8, 3)
    yield DenseLaunch(128, 128, 64, 8, 4)


_PRODUCT = Tunable("newton_schulz_triton_fwd_kernel", _launch, _alternatives)
_LAST = Tunable("newton_schulz_triton_fwd_dense_kernel", _dense_launch, _dense_alternatives)


def _descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, *block])


def _symmetric_product(
    left: Tensor, right: Tensor, alpha: float, diagonal: float = 0.0, add: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """alpha left right^T + beta add + diagonal I where that is symmetric: [n, size, size]. Contiguous tensors."""
    n, size, inner = left.shape
    out = torch.empty((n, size, size), dtype=left.dtype, device=left.device)
    described = describable(left, right, out, *([] if add is None else [add]))
    block, block_k, num_warps, num_stages, how = _PRODUCT(
        left.device, size=size, inner=inner, itemsize=left.element_size(), descriptors=int(described)
    )
    if how == SPECIALISED:
        hopper.symmetric_product(left, right, add, out, alpha, beta, diagonal)
        return out
    side = triton.cdiv(size, block)
    tiles = ((left, block_k), (right, block_k), (out, block))
    descriptors = [_descriptor(tensor, block, width) if described else None for tensor, width in tiles]
    newton_schulz_triton_fwd_kernel[(side * (side + 1) // 2, n)](
        *descriptors, left, right, add, out, size, inner, alpha, beta, diagonal,
        DESCRIPTORS=described, ADD=add is not None, BLOCK=block, BLOCK_K=block_k, PRECISION=input_precision(left.dtype),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _last_product(P: Tensor, X: Tensor, dtype: torch.dtype) -> Tensor:
    """P X / SCALE in `dtype`."""
    if not describable(P, X):
        return torch.bmm(P, X).to(dtype).mul_(1 / SCALE)
    n, size, inner = X.shape
    out = torch.empty((n, size, inner), dtype=dtype, device=X.device)
    block_m, block_n, block_k, num_warps, num_stages = _LAST(
        X.device, size=size, inner=inner, itemsize=X.element_size()
    )
    newton_schulz_triton_fwd_dense_kernel[(triton.cdiv(size, block_m) * triton.cdiv(inner, block_n), n)](
        _descriptor(P, block_m, block_k), _descriptor(X, block_k, block_n), out, size, inner, 1 / SCALE,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=8, PRECISION=input_precision(X.dtype),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _normed(G: Tensor, dtype: torch.dtype) -> Tensor:
    """SCALE G / (|G|_F + EPSILON), contiguous."""
    n, size, inner = G.shape
    norm = torch.linalg.vector_norm(G, dim=(-2, -1), dtype=torch.float32)
    X = torch.empty((n, size, inner), dtype=dtype, device=G.device)
    newton_schulz_triton_fwd_scale_kernel[(triton.cdiv(inner, 128), triton.cdiv(size, 16), n)](
        G, norm, X, *G.stride(), size, inner, SCALE=SCALE, EPSILON=EPSILON, BLOCK_M=16, BLOCK_N=128, num_warps=4
    )
    return X


def _iterate(X: Tensor, dtype: torch.dtype) -> Tensor:
    """X <- (a I + b A + c A^2) X, as c (A + h I)^2 + (a - c h^2) I: nothing is added but to the diagonal."""
    a, b, c = COEFFICIENTS
    h = b / (2 * c)
    for step in range(STEPS):
        shifted = _symmetric_product(X, X, SCALE**-2, h)
        P = _symmetric_product(shifted, shifted, c, a - c * h * h)
        X = torch.bmm(P, X) if step < STEPS - 1 else _last_product(P, X, dtype)
    return X


def _iterate_on_gram(X: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in terms of A = X X^T alone, for P X has the Gram matrix P A P: X is multiplied by the product of all P.

    What is small in A has lost bits, and P makes it large: so A is computed from X again after a few steps. A is kept
    times SCALE^2.
    """
    a, b, c = COEFFICIENTS
    for segment, steps in enumerate(GRAM_STEPS, 1):
        A = _symmetric_product(X, X, 1.0)
        product = None
        for step in range(steps):
            P = _symmetric_product(A, A, c * SCALE**-4, a, A, b * SCALE**-2)
            # All are polynomials of one matrix, so they commute, and their products are symmetric.
            product = P if product is None else _symmetric_product(P, product, 1.0)
            if step < steps - 1:
                A = _symmetric_product(_symmetric_product(P, A, 1.0), P, 1.0)
        assert product is not None
        X = torch.bmm(product, X) if segment < len(GRAM_STEPS) else _last_product(product, X, dtype)
    return X


def _gram_pays(rows: int, cols: int, dtype: torch.dtype) -> bool:
    """Whether to iterate on the Gram matrix of a wide matrix. Its roundings show in float16's results alone."""
    return cols >= 2 * rows and dtype != torch.float16


def _forward(G: Tensor) -> Tensor:
    if not G.numel():
        return torch.empty(G.shape, dtype=G.dtype, device=G.device)
    tall = G.size(-2) > G.size(-1)
    X = _normed(G.mT if tall else G, torch.float32 if G.dtype == torch.float32 else torch.float16)
    iterate = _iterate_on_gram if _gram_pays(X.size(-2), X.size(-1), G.dtype) else _iterate
    X = iterate(X, G.dtype)
    return X.mT.contiguous() if tall else X


_operator = torch.library.custom_op("llmmed::newton_schulz_triton", _forward, mutates_args=())


@_operator.register_fake
def _fake(G: Tensor) -> Tensor:
    return G.new_empty(G.shape)


def newton_schulz(G: Tensor) -> Tensor:
    """See `reference.newton_schulz`."""
    result: Tensor = _operator(G) if through_dispatcher(G) else _forward(G)
    return result


def _load() -> Callable[..., Any]:
    require_triton()
    return newton_schulz


IMPL = Implementation(
    "triton",
    load=_load,
    devices=TRITON_DEVICES,
    backward=False,
    kernel_names=("newton_schulz_triton_fwd_kernel", "newton_schulz_hopper_fwd_kernel"),
    tunable=(_PRODUCT, _LAST),
)
