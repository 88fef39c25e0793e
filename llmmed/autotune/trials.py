"""What the gate tries a candidate at: the op's small cases and the run's own calls, with values."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from llmmed.kernels.base import Call, Op, Scalar, TensorSpec

Layout = Literal["contiguous", "transposed", "padded"]

_UPSTREAM = (1.0, 1 / 3, 65536.0)
_UPSTREAM_FP16 = (1.0, 1 / 3, 512.0)  # what it can hold
_CASES_PER_SHAPE = 2  # of a candidate whose every shape is compiled anew
_MOST_ELEMENTS = {"cuda": 2**28, "cpu": 2**23}  # of the largest float64 intermediate
_BYTES_AN_ELEMENT = 256  # of a GPU's memory, for each such element: the truth stays while candidates run


@dataclass(frozen=True)
class Trial:
    """A call with values.

    Args:
        call: The arguments without their values.
        regime: The distribution of the values.
        upstream: Size of the gradients that arrive.
        layout: How they lie in memory.
        label: For the user.
        own: Whether it is one of the run's own calls.
        poison: Whether memory holds NaN until it is written. PyTorch then takes deterministic kernels, too.
    """

    call: Call
    regime: str
    upstream: float
    layout: Layout
    label: str
    own: bool
    poison: bool


def trials(
    op: Op,
    calls: list[Call],
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    few_shapes: bool = False,
    cases: Collection[str] | None = None,
    whose: str = "the run's",
) -> Iterator[Trial]:
    """Everything that a candidate is tried at, the cheap first; `whose` the calls are, for people."""
    own = dtype or (calls[0].compute_dtype if calls else torch.float32)
    for case_dtype in dict.fromkeys([own] if few_shapes else [own, torch.float32]):
        short = str(case_dtype).removeprefix("torch.")
        for index, (name, call) in enumerate(op.cases(case_dtype).items()):
            if few_shapes and index >= _CASES_PER_SHAPE:
                break
            if cases is not None and name not in cases:
                continue
            for number, regime in enumerate(op.regimes):
                size = _upstream(case_dtype)[(index + number) % 3]
                layout = get_args(Layout)[(index + 2 * number) % 3]
                label = f"case '{name}', {regime} values, arriving gradients around {size:.3g}, {short}"
                yield Trial(call, regime, size, layout, label, own=False, poison=not few_shapes)
    for call in calls:
        smaller = within(op, call, _most_elements(device))
        for regime in op.regimes[:2]:
            label = f"{whose} {smaller.describe()}, {regime} values"
            poison = regime != op.regimes[0] and not few_shapes  # at least once the kernels that the run will take
            yield Trial(smaller, regime, 1.0, "contiguous", label, own=True, poison=poison)


def within(op: Op, call: Call, most: int) -> Call:
    """The call with fewer of the op's rows, if a float64 intermediate of the whole had more than `most` elements."""
    if not op.rows:
        return call
    first = call.spec(op.rows[0])
    elements = max(
        max(spec.numel for spec in call.tensors.values()), op.cost(call).forward_flops // (2 * first.shape[-1])
    )
    rows = max(1, first.shape[0] * most // max(elements, 1))
    if rows >= first.shape[0]:
        return call

    def cut(name: str, value: TensorSpec | Scalar) -> TensorSpec | Scalar:
        if name in op.rows and isinstance(value, TensorSpec):
            return replace(value, shape=(rows, *value.shape[1:]))
        return value

    return Call(call.op, tuple((name, cut(name, value)) for name, value in call.arguments))


def _most_elements(device: torch.device) -> int:
    most = _MOST_ELEMENTS[device.type]
    if device.type != "cuda":
        return most
    return min(most, torch.cuda.get_device_properties(device).total_memory // _BYTES_AN_ELEMENT)


def _upstream(dtype: torch.dtype) -> tuple[float, float, float]:
    return _UPSTREAM_FP16 if dtype == torch.float16 else _UPSTREAM
