"""The contract of the kernels: what an operation (`Op`) is, what an `Implementation` is, and what a `Call` of one is.

An op's folder holds the op (`__init__.py`), its truth (`reference.py`), inputs and costs (`cases.py`) and one module an
implementation. Of the project those folders import this file, `draw.py`, `operator.py`, `tunable.py`, and the folders
of ops that an op is made of.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmmed.kernels.tunable import Launches, Tunable

Scalar = float | int | bool | None
Outputs = Tensor | tuple[Tensor, ...]
Inputs = dict[str, Any]  # argument name -> Tensor or Scalar, in the order of the op's signature


class Unavailable(Exception):
    """An implementation cannot be used here. The message is the reason, as the user will read it in the table."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values: shape, dtype, strides in elements, and whether a gradient is asked of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    requires_grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()), tensor.requires_grad)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, each counted once."""
        return self.numel * self.dtype.itemsize

    def empty(self, device: torch.device | str) -> Tensor:
        """Uninitialised memory with this shape and these strides; `requires_grad` is left to the caller."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def like(self, values: Tensor) -> Tensor:
        """`values` (same shape, any dtype) laid out with this dtype and these strides."""
        return self.empty(values.device).copy_(values)

    def to_json(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": self.shape, "dtype": dtype, "stride": self.stride, "requires_grad": self.requires_grad}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        dtype = getattr(torch, data["dtype"])
        return cls(tuple(data["shape"]), dtype, tuple(data["stride"]), data["requires_grad"])


def tensor_spec(*shape: int, dtype: torch.dtype, requires_grad: bool = False) -> TensorSpec:
    """The spec of a contiguous tensor, for writing cases."""
    return TensorSpec(shape, dtype, tuple(torch.empty(shape, device="meta").stride()), requires_grad)


def heads_spec(
    batch: int, seq: int, heads: int, head_dim: int, dtype: torch.dtype, row: int | None = None
) -> TensorSpec:
    """The spec of states [batch, seq, heads, head_dim] that want gradients, for writing cases: contiguous, or within a
    tensor with so many elements a position."""
    spec = tensor_spec(batch, seq, heads, head_dim, dtype=dtype, requires_grad=True)
    return spec if row is None else replace(spec, stride=(seq * row, row, head_dim, 1))


@dataclass(frozen=True)
class Call:
    """One call of an op as the training step makes it: every argument, tensors by their specs. Hashable."""

    op: str
    arguments: tuple[tuple[str, TensorSpec | Scalar], ...]

    @classmethod
    def of(cls, op: str, **arguments: TensorSpec | Scalar) -> Call:
        return cls(op, tuple(arguments.items()))

    def __getitem__(self, name: str) -> TensorSpec | Scalar:
        return dict(self.arguments)[name]

    def spec(self, name: str) -> TensorSpec:
        """The spec of a tensor argument. Raises `TypeError` if the argument is not a tensor."""
        value = self[name]
        if not isinstance(value, TensorSpec):
            raise TypeError(f"{self.op}: argument '{name}' is {value!r}, not a tensor")
        return value

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {name: value for name, value in self.arguments if isinstance(value, TensorSpec)}

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor: the one the run computes in."""
        return next(spec.dtype for spec in self.tensors.values() if spec.dtype.is_floating_point)

    def describe(self) -> str:
        """For people: `x 24576x384 bfloat16, weight 384 float32`."""
        return ", ".join(
            f"{name} {'x'.join(map(str, spec.shape)) or 'scalar'} {str(spec.dtype).removeprefix('torch.')}"
            for name, spec in self.tensors.items()
        )

    def to_json(self) -> dict[str, Any]:
        arguments = {n: v.to_json() if isinstance(v, TensorSpec) else v for n, v in self.arguments}
        return {"op": self.op, "arguments": arguments}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Call:
        return cls(
            data["op"],
            tuple((n, TensorSpec.from_json(v) if isinstance(v, dict) else v) for n, v in data["arguments"].items()),
        )


@dataclass(frozen=True)
class Cost:
    """The least that a call must do: bytes through device memory and floating-point operations, each direction."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class Op:
    """An operation of the training step.

    Args:
        name: The folder's name, and the attribute of the kernel table that the model calls.
        reference: The truth: plain torch, any float dtype, run in float64 by the gate. Its signature is the op's.
        differentiable: The arguments that receive a gradient.
        cases: For a compute dtype, small calls by name: odd lengths, one row, non-contiguous, what is hard here.
        regimes: The names of the value distributions that `make_inputs` knows; the first is the bland one.
        make_inputs: Draws the arguments of a call on a device: `(call, regime, generator, device) -> inputs`.
            The generator lives on that device. Tensors have the call's strides; none requires a gradient yet.
        cost: The least traffic and arithmetic of a call.
        rows: The arguments whose first dimension counts the same rows, sequences or matrices. The gate tries a call
            that is too large for float64 with fewer of them; where none is named, the whole call.
        parts: Optional. Further parts by which the error is judged: `(inputs, tensor name, tensor) -> {part: mask}`,
            where the tensor name is `output0`, ... or `grad_<argument>` and the mask is boolean, of the tensor's shape.
        draw: Optional. A small call of random shapes and strides, for `scripts/verify.py random=100`.
    """

    name: str
    reference: Callable[..., Outputs]
    differentiable: tuple[str, ...]
    cases: Callable[[torch.dtype], Mapping[str, Call]]
    regimes: tuple[str, ...]
    make_inputs: Callable[[Call, str, torch.Generator, torch.device], Inputs]
    cost: Callable[[Call], Cost]
    rows: tuple[str, ...] = ()
    parts: Callable[[Inputs, str, Tensor], Mapping[str, Tensor]] | None = None
    draw: Callable[[random.Random, torch.dtype], Call] | None = None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: a pure function of tensors with the op's signature, which never mutates its inputs.

    Args:
        name: `pytorch` for `pytorch.py`, `triton` for `triton_impl.py`: the module's name without `_impl`.
        load: Imports what is needed and returns the function. Raises `Unavailable` with the reason.
        devices: Device types it runs on.
        dtypes: Compute dtypes it supports.
        backward: Whether gradients flow through it.
        compiles: Whether `torch.compile(fullgraph=True)` can trace a step that calls it.
        deterministic: Whether two runs on the same inputs give the same bits.
        per_shape: Whether `torch.compile` writes its kernels anew for each shape, which takes seconds, in eager mode
            too. The gate then tries it at fewer shapes.
        kernel_names: Substrings of the device kernels it launches, by which a trace shows that it ran.
        uses: Ops that it calls itself. The function then takes the table as the keyword argument `kernels`.
        tunable: The kernels whose launch parameters a search may choose, one `Tunable` each.
    """

    name: str
    load: Callable[[], Callable[..., Outputs]]
    devices: tuple[str, ...] = ("cuda", "cpu")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    backward: bool = True
    compiles: bool = True
    deterministic: bool = True
    per_shape: bool = False
    kernel_names: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    tunable: tuple[Tunable[Any], ...] = ()

    def take_launches(self, launches: Launches) -> None:
        """Sets how its kernels are launched from now on, by default where nothing is said. Raises `ValueError`."""
        if strangers := {site.kernel for site in launches} - {tunable.kernel for tunable in self.tunable}:
            raise ValueError(f"{self.name} has no kernel {', '.join(sorted(strangers))} with a launch to choose")
        for tunable in self.tunable:
            tunable.take({site: values for site, values in launches.items() if site.kernel == tunable.kernel})

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this implementation does not apply to a device and compute dtype, or None if it does."""
        if device.type not in self.devices:
            wants = " or ".join({"cuda": "a CUDA GPU", "cpu": "a CPU"}.get(d, d) for d in self.devices)
            return f"needs {wants}"
        if dtype not in self.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"supports {known}, not {str(dtype).removeprefix('torch.')}"
        return None


@dataclass(frozen=True)
class Kernels:
    """The table that the model calls: `kernels.rms_norm(x, weight, eps)`.

    Args:
        functions: Op name -> function with the op's signature.
        chosen: Op name -> name of the implementation behind it.
    """

    functions: Mapping[str, Callable[..., Any]]
    chosen: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Plain attributes, so that a compiler tracing the model sees a constant function.
        for name, function in self.functions.items():
            object.__setattr__(self, name, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        functions = self.__dict__.get("functions", {})  # there are none yet while a copy is being made
        raise AttributeError(f"no kernel for op '{name}' in this table; it has {', '.join(sorted(functions))}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.functions)
