"""Turns a forward and a backward function into a differentiable PyTorch operator.

`torch.compile` sees a `torch.library.custom_op` with a fake and an autograd formula, so the graph does not break. Eager
mode takes a plain `torch.autograd.Function`, which spares it the dispatcher's cost of tens of microseconds a call.
"""

# Annotations must be real objects: torch infers the operator's schema from them. So no `from __future__` here.
import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from llmmed.kernels.base import Unavailable
from llmmed.kernels.interpreter import spare_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


class Gpu(NamedTuple):
    """What launch parameters depend on."""

    multiprocessors: int
    l2_bytes: int
    shared_bytes: int  # that one program may have
    capability: int  # 90 for an H100


_SMALL = Gpu(2, 2**20, 2**16, 90)  # a CPU, where kernels run in the interpreter, which knows tensor descriptors
_LEAST_SHARED = 101376  # every GPU since sm_80 has as much
_absent_gpu: Gpu | None = None


def require_triton() -> None:
    """Raises `Unavailable` where Triton kernels cannot run."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"Triton is not installed ({error}); pip install triton") from error
    if INTERPRETED:
        spare_interpreter()
    if not INTERPRETED and _absent_gpu is None and not torch.cuda.is_available():
        raise Unavailable("Triton kernels need a CUDA GPU, and torch sees none")


def as_rows(tensor: Tensor) -> Tensor:
    """`tensor` as [rows, last dimension] with unit stride in the last; a view where the strides allow it."""
    return unit_stride(tensor.reshape(-1, tensor.shape[-1]))


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor`, or a contiguous copy where the elements of its last dimension are apart."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def through_dispatcher(tensor: Tensor) -> bool:
    """Whether an operator is to be called, which a compiler sees and which has a fake: where a kernel is traced, or a
    tensor has no memory and no `absent_gpu` is planned for. Else its function may be called, which costs less.
    """
    if torch.compiler.is_compiling() or type(tensor) is FakeTensor:
        return True
    return tensor.is_meta and _absent_gpu is None


_in_compiled_step = False


@contextlib.contextmanager
def as_in_compiled_step(active: bool = True) -> Iterator[None]:
    """Lets functions that are called directly launch what their operator does in a compiled step: to time it, and to
    find its launches.
    """
    global _in_compiled_step
    before, _in_compiled_step = _in_compiled_step, active
    try:
        yield
    finally:
        _in_compiled_step = before


def in_compiled_step() -> bool:
    """Whether `as_in_compiled_step` holds."""
    return _in_compiled_step


def refuse_second_derivative(name: str) -> None:
    """Raises `RuntimeError` in a backward pass that is to be differentiated itself (`create_graph=True`).

    Autograd does not see into a kernel: it would take what is missing for zero, and say nothing.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative; use kernels=pytorch")


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number on a CPU."""
    return gpu_of(device).multiprocessors


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache; a small number on a CPU."""
    return gpu_of(device).l2_bytes


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have; a small number on a CPU."""
    return gpu_of(device).shared_bytes


def capability(device: torch.device) -> int:
    """Compute capability, 90 for an H100; 90 on a CPU."""
    return gpu_of(device).capability


def describable(*tensors: Tensor) -> bool:
    """Whether the hardware copies tiles of these contiguous tensors (TMA): since sm_90, of rows of whole 16 bytes that
    begin at such an address.

    Not float32, which no tensor core waits for; in the interpreter it stands for all dtypes.
    """
    fast = INTERPRETED or all(t.element_size() == 2 for t in tensors)
    whole = all(t.shape[-1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors)
    return fast and whole and capability(tensors[0].device) >= 90


def input_precision(dtype: torch.dtype) -> str:
    """Of `tl.dot`, as PyTorch's own products have it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@contextlib.contextmanager
def absent_gpu(gpu: Gpu) -> Iterator[None]:
    """Lets Triton implementations load without a GPU and plan their launches on meta tensors for this one."""
    global _absent_gpu
    before, _absent_gpu = _absent_gpu, gpu
    try:
        yield
    finally:
        _absent_gpu = before


def gpu_of(device: torch.device) -> Gpu:
    """What launches on this device depend on; of a CPU, a small GPU's, since kernels run there in the interpreter."""
    if device.type == "cuda":
        return _present_gpu(device)
    return _absent_gpu or _SMALL


@functools.cache
def _present_gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED)
    capability = 10 * properties.major + properties.minor
    return Gpu(properties.multi_processor_count, properties.L2_cache_size, shared, capability)


def _shorten_compiler_messages() -> None:
    """Lets Inductor name an operator without writing out its arguments.

    When it first meets a custom operator it puts the arguments into a log message, also where nobody reads the log
    (torch 2.11; since 2.13 only if somebody does). Each is printed with all that it is computed from, which in a deep
    model without fused PyTorch operations between the custom ones grows exponentially: the compilation never ends.
    """
    if "torch._inductor" not in sys.modules:
        return  # nothing compiles yet, and importing it takes seconds
    from torch._inductor.exc import OperatorIssue

    def operator_str(target: Any, args: Any, kwargs: Any) -> str:
        return f"  target: {target}, {len(args)} arguments"

    OperatorIssue.operator_str = staticmethod(operator_str)  # type: ignore[method-assign]


def _told_to_compilers(fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake function of an operator, which a compiler runs before anything else of it."""

    @functools.wraps(fake)
    def run(*args: Any, **kwargs: Any) -> Any:
        _shorten_compiler_messages()
        return fake(*args, **kwargs)

    return run


def make_operator(
    name: str,
    *,
    forward: Callable[..., tuple[Tensor, ...]],
    fake_forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Sequence[Tensor]],
    fake_backward: Callable[..., Sequence[Tensor]],
    save: Callable[[tuple[Any, ...], tuple[Tensor, ...]], tuple[Any, ...]],
    gradients: Sequence[str],
    spread: Callable[..., Sequence[Tensor | None]] = lambda *results: results,
    n_outputs: int = 1,
) -> Callable[..., Any]:
    """Builds the operator; the result takes `forward`'s arguments by position or by name.

    Args:
        name: `llmmed::rms_norm_triton`; the operators are `<name>_forward` and `<name>_backward`.
        forward: `(arguments) -> (public outputs, what only backward needs)`. Fully annotated; allocates its results.
        fake_forward: The same on fake tensors: allocates, computes nothing.
        backward: `(one gradient per public output, then what `save` returned) -> results`. Fully annotated. Gradients
            may come in any strides. How many results there are may depend on the arguments if it returns a list.
        fake_backward: The same on fake tensors.
        save: `(arguments, forward's results) -> what backward needs` (tensors and plain numbers).
        gradients: For each gradient, the argument that it belongs to.
        spread: `(backward's results) -> gradients`. An operator's results must not share memory; here one result can
            become the gradient of several arguments, or views of it the gradients; None for an argument that is None.
        n_outputs: How many of `forward`'s results are public.
    """
    signature = inspect.signature(forward)
    names = list(signature.parameters)
    positions = [names.index(argument) for argument in gradients]
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not inspect.Parameter.empty}

    forward_op = torch.library.custom_op(f"{name}_forward", forward, mutates_args=())
    forward_op.register_fake(_told_to_compilers(fake_forward))
    backward_op = torch.library.custom_op(f"{name}_backward", backward, mutates_args=())
    backward_op.register_fake(fake_backward)

    def keep(ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        saved = save(arguments, results)
        ctx.save_for_backward(*(value for value in saved if isinstance(value, Tensor)))
        ctx.template = [None if isinstance(value, Tensor) else (value,) for value in saved]
        ctx.output_specs = [(r.shape, r.dtype, r.device) for r in results[:n_outputs]]

    def run_backward(ctx: Any, output_gradients: tuple[Tensor | None, ...], function: Callable[..., Any]) -> list[Any]:
        tensors = iter(ctx.saved_tensors)
        saved = [next(tensors) if slot is None else slot[0] for slot in ctx.template]
        upstream = [
            torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient
            for gradient, (shape, dtype, device) in zip(output_gradients[:n_outputs], ctx.output_specs, strict=True)
        ]
        found: list[Any] = [None] * len(names)
        for position, gradient in zip(positions, spread(*function(*upstream, *saved)), strict=True):
            found[position] = gradient if ctx.needs_input_grad[position] else None
        return found

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        keep(ctx, inputs, output)

    forward_op.register_autograd(
        lambda ctx, *output_gradients: tuple(run_backward(ctx, output_gradients, backward_op)),
        setup_context=setup_context,
    )

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            results = forward(*arguments)
            ctx.set_materialize_grads(False)
            keep(ctx, arguments, results)
            ctx.mark_non_differentiable(*results[n_outputs:])
            return results

        @staticmethod
        def backward(ctx: Any, *output_gradients: Tensor | None) -> Any:
            refuse_second_derivative(name)
            return tuple(run_backward(ctx, output_gradients, backward))

    def complete(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        rest = names[len(args) :]
        given = {**{n: defaults[n] for n in rest if n in defaults}, **kwargs}
        if len(args) > len(names) or given.keys() != set(rest):
            signature.bind(*args, **kwargs)  # raises the TypeError that says what is wrong
        return args + tuple(given[n] for n in rest)

    def operator(*args: Any, **kwargs: Any) -> Any:
        # Eager mode's hot path gives all by position.
        arguments = complete(args, kwargs) if kwargs or len(args) != len(names) else args
        results = forward_op(*arguments) if through_dispatcher(arguments[0]) else Direct.apply(*arguments)
        return results[0] if n_outputs == 1 else results[:n_outputs]

    operator.__name__ = name.rpartition("::")[2]
    operator.forward_op = forward_op  # type: ignore[attr-defined]  # for `torch.library.opcheck`
    operator.backward_op = backward_op  # type: ignore[attr-defined]
    return operator
