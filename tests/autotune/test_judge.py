"""What the gate allows: parts are blocks of rows and columns, and the device is asked once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmmed.autotune.judge import Truth, _parts, judge


class Dispatched(TorchDispatchMode):
    """Every operation that reaches a device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def truth(shape: tuple[int, ...]) -> Truth:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Truth(value, value.float(), 1.0, {"large": value > 1})


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 17), (7, 33), (3, 9, 65)])
def test_parts_are_blocks_of_rows_and_columns(shape: tuple[int, ...]) -> None:
    value = truth(shape).value
    names, counts, sums, sizes = _parts(0.1 * value, value, 2 * value, {"large": value > 1})

    def square(part: Tensor) -> list[float]:
        return [factor**2 * part.square().sum().item() for factor in (0.1, 1.0, 2.0)]

    assert (names[0], names[-1], counts[0]) == ("", "large", value.numel())
    assert sums[0].tolist() == pytest.approx(square(value))
    assert sums[-1].tolist() == pytest.approx(square(value[value > 1]))
    assert sizes.tolist() == [int((value > 1).sum())]
    table = value.reshape(-1, value.shape[-1]) if value.ndim else value
    for name, count, found in zip(names[1:-1], counts[1:], sums[1:-1], strict=True):
        axis, _, span = name.partition(" ")
        start, _, end = span.partition(" to ")
        end = end or start
        assert axis.endswith("s") == (start != end), name
        block = table[int(start) : int(end) + 1] if axis.startswith("row") else table[:, int(start) : int(end) + 1]
        assert block.numel() == count
        assert found.tolist() == pytest.approx(square(block))
    for axis, size in zip(("row", "column"), table.shape, strict=False):
        blocks = [name for name in names if name.startswith(axis)]
        assert len(blocks) == (0 if size < 2 else -(-size // -(-size // 8)))


def test_the_device_is_asked_once() -> None:
    """Each answer that a GPU gives costs as much as dozens of launches."""
    held = truth((7, 33, 65))
    found = (held.value * (1 + 1e-7)).float()
    with Dispatched() as dispatched:
        finding, error = judge("x", held, found, torch.float32)
    assert 0 < finding.ratio < 1
    assert 0 < error < 2e-7
    assert "_local_scalar_dense" not in dispatched.names  # a single value that the host waits for
    assert len(dispatched.names) < 80


def test_what_is_not_finite_is_counted() -> None:
    held = truth((7, 33))
    found = held.value.float()
    found[2, 3:5] = torch.inf
    finding, _ = judge("x", held, found, torch.float32)
    assert finding.message == "x: 2 of 231 elements are not finite"
    assert finding.ratio == float("inf")
