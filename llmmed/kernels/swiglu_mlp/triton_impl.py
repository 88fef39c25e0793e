"""`swiglu_mlp` with the activation in the products that stand beside it: in Triton those two, cuBLAS the other four.

Forward, one kernel multiplies a tile of x with the same rows of both halves of the weight, and writes gate, up and what
the activation makes of them; where cuBLAS's own product is ahead by more than that spares, product and activation
follow one another. Backward, the gradient that arrives at the activation is a tile in registers, which never reaches
memory. The products that are left, among them all that sum over rows, are cuBLAS's. Between the two, gate and up are
kept, and the activation's result; where the sum is long, backward's kernel writes the latter once more instead.

Hopper has kernels of its own, in `hopper.py`; those here run everywhere.
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
from llmmed.kernels.operator import (
    INTERPRETED,
    TRITON_DEVICES,
    as_rows,
    capability,
    describable,
    input_precision,
    make_operator,
    require_triton,
    shared_bytes,
)
from llmmed.kernels.swiglu.triton_impl import activate
from llmmed.kernels.swiglu_mlp import hopper
from llmmed.kernels.tunable import Tunable

_GROUP = 8  # rows of tiles that run beside each other
_KEPT_UP_TO = 1024  # a width; above it the tensor cores take longer than memory, backward, and can hide a third write
_MOST_ELEMENTS = 2**31 - 1  # of an operand that cuBLAS sums over the rows of


@triton.jit
def _tile_of(n_rows, d_ff, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Where this program's tile begins. GROUP rows of tiles at a time, column by column: what neighbouring programs
    read stays in the L2 cache."""
    tile, tiles_n = tl.program_id(0), tl.cdiv(d_ff, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tl.cdiv(n_rows, BLOCK_M) - group * GROUP, GROUP)
    in_group = tile % (GROUP * tiles_n)
    return (group * GROUP + in_group % height) * BLOCK_M, in_group // height * BLOCK_N


@triton.jit
def _load_tile(
    desc, ptr, stride, row, col, n_rows, n_cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix; what lies outside of it is zero."""
    if DESCRIPTORS:
        return desc.load([row, col])
    rows, cols = row + tl.arange(0, BLOCK_M)[:, None], col + tl.arange(0, BLOCK_N)[None, :]
    return tl.load(ptr + rows.to(tl.int64) * stride + cols, mask=(rows < n_rows) & (cols < n_cols), other=0.0)


@triton.jit
def swiglu_mlp_triton_fwd_kernel(
    x_desc, weight_desc, x_ptr, weight_ptr, gate_up_ptr, hidden_ptr, n_rows, d_ff, width, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, col = _tile_of(n_rows, d_ff, BLOCK_M, BLOCK_N, GROUP)
    both = tl.arange(0, 2 * BLOCK_N)  # BLOCK_N rows of the gate's weight, then as many of up's
    half, unit = both // BLOCK_N, col + both % BLOCK_N
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        x = _load_tile(x_desc, x_ptr, width, row, start, n_rows, width, BLOCK_M, BLOCK_K, DESCRIPTORS)
        if DESCRIPTORS:
            weight = weight_desc.load([0, col, start]).reshape(2 * BLOCK_N, BLOCK_K)
        else:
            ks = start + tl.arange(0, BLOCK_K)
            weights = weight_ptr + (half * d_ff + unit).to(tl.int64)[:, None] * width + ks[None, :]
            weight = tl.load(weights, mask=(unit < d_ff)[:, None] & (ks < width)[None, :], other=0.0)
        acc = tl.dot(x, weight.T, acc, input_precision=PRECISION)
    gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    # Backward has them as they are stored, so that forward computes with the same values.
    gate, up = gate.to(gate_up_ptr.dtype.element_ty), up.to(gate_up_ptr.dtype.element_ty)
    wide = gate.to(tl.float32)
    hidden = wide * tl.sigmoid(wide) * up.to(tl.float32)

    rows, cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < n_rows - row) & (cols < d_ff - col)
    to = gate_up_ptr + row.to(tl.int64) * 2 * d_ff + col + rows * 2 * d_ff + cols
    tl.store(to, gate, mask=mask)
    tl.store(to + d_ff, up, mask=mask)
    to = hidden_ptr + row.to(tl.int64) * d_ff + col + rows * d_ff + cols
    tl.store(to, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_mlp_triton_bwd_kernel(
    dy_desc, weight_desc, gate_up_desc, dgate_up_desc, hidden_desc,
    dy_ptr, weight_ptr, gate_up_ptr, dgate_up_ptr, hidden_ptr,
    n_rows, d_ff, width, DESCRIPTORS: tl.constexpr, REWRITES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, col = _tile_of(n_rows, d_ff, BLOCK_M, BLOCK_N, GROUP)
    dhidden = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        dy = _load_tile(dy_desc, dy_ptr, width, row, start, n_rows, width, BLOCK_M, BLOCK_K, DESCRIPTORS)
        weight = _load_tile(weight_desc, weight_ptr, d_ff, start, col, width, d_ff, BLOCK_K, BLOCK_N, DESCRIPTORS)
        dhidden = tl.dot(dy, weight, dhidden, input_precision=PRECISION)

    rows, cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < n_rows - row) & (cols < d_ff - col)
    first = row.to(tl.int64) * 2 * d_ff + col
    if DESCRIPTORS:
        gate = gate_up_desc.load([row, 0, col]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        up = gate_up_desc.load([row, 1, col]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
    else:
        halves = gate_up_ptr + first + rows * 2 * d_ff + cols
        gate = tl.load(halves, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(halves + d_ff, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dhidden * up * (sigmoid + silu * (1.0 - sigmoid))
    dup = dhidden * silu
    dgate, dup = dgate.to(dgate_up_ptr.dtype.element_ty), dup.to(dgate_up_ptr.dtype.element_ty)
    if DESCRIPTORS:
        dgate_up_desc.store([row, 0, col], dgate.reshape(BLOCK_M, 1, BLOCK_N))
        dgate_up_desc.store([row, 1, col], dup.reshape(BLOCK_M, 1, BLOCK_N))
    else:
        to = dgate_up_ptr + first + rows * 2 * d_ff + cols
        tl.store(to, dgate, mask=mask)
        tl.store(to + d_ff, dup, mask=mask)
    if REWRITES:
        hidden = (silu * up).to(hidden_ptr.dtype.element_ty)
        if DESCRIPTORS:
            hidden_desc.store([row, col], hidden)
        else:
            tl.store(hidden_ptr + row.to(tl.int64) * d_ff + col + rows * d_ff + cols, hidden, mask=mask)


TILES, SPECIALISED, APART = 0, 1, 2
"""How: kernels whose programs load and multiply by turns, a tile each; those for Hopper, whose warps have tasks of
their own; or, forward alone, cuBLAS's product and the activation after it."""


class Launch(NamedTuple):
    """How to compute; for `TILES`, a tile's sides (of hidden units for which both halves are computed, in the forward
    kernel), and its resources."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    how: int = TILES


_SMALL_TILE = Launch(128, 64, 32, 8, 3)  # for less shared memory, and for loads by pointers


def _forward_launch(device: torch.device, width: int, d_ff: int, itemsize: int, descriptors: int) -> Launch:
    """Two programs a multiprocessor where they fit: while one writes, the other multiplies. The longer the sum, the
    less there is to hide, and the more does a better product count."""
    if itemsize == 4:
        return Launch(32, 32, 32, 4, 2)
    launch = Launch(128, 64, 64, 4, 3)
    if not descriptors or not _two_fit(device, launch, 2 * launch.block_n):
        launch = _SMALL_TILE
    if _specialises(device, d_ff, descriptors):
        return launch._replace(how=SPECIALISED)
    return launch._replace(how=TILES if width <= 1024 else APART)


def _backward_launch(device: torch.device, width: int, d_ff: int, itemsize: int, descriptors: int) -> Launch:
    if itemsize == 4:
        return Launch(32, 32, 32, 4, 2)
    launch = Launch(128, 64, 64, _backward_warps(width), 3)
    if not descriptors or not _two_fit(device, launch, launch.block_n):
        launch = _SMALL_TILE
    return launch._replace(how=SPECIALISED if _specialises(device, d_ff, descriptors) else TILES)


def _backward_warps(width: int) -> int:
    return 4 if width <= _KEPT_UP_TO else 8  # a third result takes registers


def _specialises(device: torch.device, d_ff: int, descriptors: int) -> bool:
    return bool(descriptors) and not INTERPRETED and capability(device) == 90 and d_ff % hopper.BLOCK == 0


def _two_fit(device: torch.device, launch: Launch, cols: int) -> bool:
    """Whether the shared memory of a multiprocessor holds the pipelines of two programs, of 16-bit tiles."""
    return 2 * launch.num_stages * (launch.block_m + cols) * launch.block_k * 2 < shared_bytes(device)


def _forward_alternatives(
    device: torch.device, width: int, d_ff: int, itemsize: int, descriptors: int
) -> Iterator[Launch]:
    if itemsize == 2:
        default = _forward_launch(device, width, d_ff, itemsize, descriptors)
        yield from (default._replace(how=how) for how in (TILES, APART))


def _backward_alternatives(
    device: torch.device, width: int, d_ff: int, itemsize: int, descriptors: int
) -> Iterator[Launch]:
    if itemsize == 2 and descriptors:
        yield Launch(64, 128, 64, _backward_warps(width), 3)
        yield Launch(128, 64, 64, _backward_warps(width), 3)


_FORWARD = Tunable("swiglu_mlp_triton_fwd_kernel", _forward_launch, _forward_alternatives)
_BACKWARD = Tunable("swiglu_mlp_triton_bwd_kernel", _backward_launch, _backward_alternatives)


def _descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def _grid(launch: Launch, n_rows: int, d_ff: int) -> tuple[int]:
    return (triton.cdiv(n_rows, launch.block_m) * triton.cdiv(d_ff, launch.block_n),)


def _constants(launch: Launch, described: bool, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "DESCRIPTORS": described,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
        "GROUP": _GROUP,
        "PRECISION": input_precision(dtype),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def _activate(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up side by side, [rows, 2 d_ff], and the activation's result [rows, d_ff], of contiguous tensors."""
    (n_rows, width), d_ff = x.shape, weight.shape[0] // 2
    described = describable(x, weight)
    launch = _FORWARD(x.device, width=width, d_ff=d_ff, itemsize=x.element_size(), descriptors=int(described))
    if launch.how == APART:
        gate_up = x @ weight.mT
        return gate_up, activate(gate_up)
    gate_up = torch.empty((n_rows, 2 * d_ff), dtype=x.dtype, device=x.device)
    hidden = torch.empty((n_rows, d_ff), dtype=x.dtype, device=x.device)
    m, n, k = launch.block_m, launch.block_n, launch.block_k
    if n_rows and launch.how == SPECIALISED:
        hopper.activate(x, weight, gate_up, hidden)
    elif n_rows:
        swiglu_mlp_triton_fwd_kernel[_grid(launch, n_rows, d_ff)](
            _descriptor(x, m, k) if described else None,
            _descriptor(weight.view(2, d_ff, width), 2, n, k) if described else None,
            x, weight, gate_up, hidden, n_rows, d_ff, width, **_constants(launch, described, x.dtype),
        )  # fmt: skip
    return gate_up, hidden


def _activation_gradient(dy: Tensor, weight: Tensor, gate_up: Tensor, rewrites: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of gate and up, [rows, 2 d_ff], of contiguous tensors, and once more the activation's result."""
    n_rows, (width, d_ff) = dy.shape[0], weight.shape
    dgate_up = torch.empty_like(gate_up)
    hidden = gate_up.new_empty((n_rows, d_ff)) if rewrites else None
    halves = gate_up.view(n_rows, 2, d_ff)
    described = describable(dy, weight, halves)
    launch = _BACKWARD(dy.device, width=width, d_ff=d_ff, itemsize=dy.element_size(), descriptors=int(described))
    m, n, k = launch.block_m, launch.block_n, launch.block_k
    if n_rows and launch.how == SPECIALISED:
        hopper.differentiate(dy, weight, gate_up, dgate_up, hidden)
    elif n_rows:
        swiglu_mlp_triton_bwd_kernel[_grid(launch, n_rows, d_ff)](
            _descriptor(dy, m, k) if described else None,
            _descriptor(weight, k, n) if described else None,
            _descriptor(halves, m, 1, n) if described else None,
            _descriptor(dgate_up.view(n_rows, 2, d_ff), m, 1, n) if described else None,
            _descriptor(hidden, m, n) if described and hidden is not None else None,
            dy, weight, gate_up, dgate_up, hidden, n_rows, d_ff, width,
            REWRITES=rewrites, **_constants(launch, described, dy.dtype),
        )  # fmt: skip
    return dgate_up, hidden


def _summed_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, in pieces where an operand has more elements than cuBLAS counts: it loses what lies beyond 2^31."""
    rows = _MOST_ELEMENTS // max(left.shape[1], right.shape[1])
    if left.shape[0] <= rows:
        return left.mT @ right
    total = torch.zeros((left.shape[1], right.shape[1]), dtype=torch.float32, device=left.device)
    for one, other in zip(left.split(rows), right.split(rows), strict=True):
        total += one.mT @ other
    return total.to(left.dtype)


def _keeps(x: Tensor) -> bool:
    """Whether the activation's result stays in memory until backward, for an input [..., width]."""
    return x.shape[-1] <= _KEPT_UP_TO


def _forward(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate_up, hidden = _activate(as_rows(x).contiguous(), gate_up_weight.contiguous())
    y = (hidden @ down_weight.mT).view(x.shape)
    return y, gate_up, hidden if _keeps(x) else hidden.new_empty((0, hidden.shape[1]))


def _fake_forward(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, d_ff = x.numel() // x.shape[-1], down_weight.shape[1]
    return x.new_empty(x.shape), x.new_empty((n_rows, 2 * d_ff)), x.new_empty((n_rows if _keeps(x) else 0, d_ff))


def _backward(
    dy: Tensor, x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, gate_up: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy_rows = as_rows(dy).contiguous()
    dgate_up, rewritten = _activation_gradient(dy_rows, down_weight.contiguous(), gate_up, not _keeps(x))
    hidden = hidden if rewritten is None else rewritten
    dx = (dgate_up @ gate_up_weight).view(x.shape)
    return dx, _summed_over_rows(dgate_up, as_rows(x)), _summed_over_rows(dy_rows, hidden)


def _fake_backward(
    dy: Tensor, x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, gate_up: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(gate_up_weight.shape), x.new_empty(down_weight.shape)


_operator = make_operator(
    "llmmed::swiglu_mlp_triton",
    forward=_forward,
    fake_forward=_fake_forward,
    backward=_backward,
    fake_backward=_fake_backward,
    save=lambda arguments, results: (*arguments, *results[1:]),
    gradients=("x", "gate_up_weight", "down_weight"),
)


def swiglu_mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """See `reference.swiglu_mlp`. Raises `ValueError` where a weight does not fit."""
    d_model, d_ff = down_weight.shape
    if x.shape[-1] != d_model or gate_up_weight.shape != (2 * d_ff, d_model):
        raise ValueError(
            f"swiglu_mlp (triton): x is {tuple(x.shape)} and the weights {tuple(gate_up_weight.shape)} and "
            f"{tuple(down_weight.shape)}; they must be [..., d_model], [2 d_ff, d_model] and [d_model, d_ff]"
        )
    result: Tensor = _operator(x, gate_up_weight, down_weight)
    return result


def _load() -> Callable[..., Any]:
    require_triton()
    return swiglu_mlp


IMPL = Implementation(
    "triton",
    load=_load,
    devices=TRITON_DEVICES,
    kernel_names=(
        "swiglu_mlp_triton_fwd_kernel",
        "swiglu_mlp_triton_bwd_kernel",
        "swiglu_mlp_hopper_fwd_kernel",
        "swiglu_mlp_hopper_bwd_kernel",
    ),
    tunable=(_FORWARD, _BACKWARD),
)
