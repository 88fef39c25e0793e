"""Compiles Triton implementations for GPUs that are not there, and tells what each kernel takes of them.

An implementation runs on meta tensors with every launch recorded instead of executed; what was recorded is compiled by
Triton's own path, ptxas included, whose log says how many registers a kernel uses and spills.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import io
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from llmmed.kernels.base import Call, Op
from llmmed.kernels.catalog import get_implementation, get_op, load_function
from llmmed.kernels.operator import INTERPRETED, Gpu, absent_gpu, gpu_of

if TYPE_CHECKING:
    from triton import JITFunction

TARGETS: Mapping[int, Gpu] = {
    gpu.capability: gpu
    for gpu in (
        Gpu(108, 40 * 2**20, 166912, 80),  # A100
        Gpu(84, 6 * 2**20, 101376, 86),  # A40, RTX 3090
        Gpu(142, 96 * 2**20, 101376, 89),  # L40S
        Gpu(132, 50 * 2**20, 232448, 90),  # H100
        Gpu(148, 126 * 2**20, 232448, 100),  # B200
        Gpu(170, 96 * 2**20, 101376, 120),  # RTX 5090
    )
}
"""Compute capability -> a GPU that has it (shared memory: CUDA C++ Programming Guide, compute capabilities)."""


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel compiled for one target.

    Args:
        op, implementation, kernel: Whose it is.
        target: Compute capability, 90 for an H100.
        constants: Its compile-time arguments and launch options, for people.
        registers: Of a thread.
        spill_stores, spill_loads: Bytes a thread moves because registers ran out.
        shared_bytes: Shared memory of a program.
        serialized: Whether products wait for each other because registers ran out.
        code: Of kernels in Gluon, what the compiler made by stage: `ttgir` and `ptx`.
    """

    op: str
    implementation: str
    kernel: str
    target: int
    constants: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    serialized: bool = False
    code: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def spills(self) -> int:
        """Bytes, both directions."""
        return self.spill_stores + self.spill_loads

    @property
    def fits(self) -> bool:
        """Whether a program's shared memory is what the target has, so that it can be launched at all."""
        return self.shared_bytes <= TARGETS[self.target].shared_bytes

    def describe(self) -> str:
        """For people: `rms_norm/triton rms_norm_triton_fwd_kernel sm_90: 40 registers, 0 bytes spilled, ...`."""
        return (
            f"{self.op}/{self.implementation} {self.kernel} sm_{self.target}: {self.registers} registers, "
            f"{self.spills} bytes spilled, {self.shared_bytes} shared ({self.constants})"
        )


def compile_ahead_of_time(
    op: str, implementation: str, calls: Iterable[Call], targets: Iterable[int] = tuple(TARGETS), processes: int = 2
) -> list[CompiledKernel]:
    """Compiles what an implementation launches at some calls, forward and backward, for each target.

    Raises:
        RuntimeError: Triton runs in its interpreter, in which nothing can be compiled.
        KeyError: no such implementation, or a target outside `TARGETS`.
        Unavailable: Triton is not installed.
    """
    return compile_launches(record_launches(op, implementation, calls, targets), processes)


@dataclass(frozen=True)
class Launch:
    """One kernel as one target would compile it. Equal launches share `key`; the rest pickles."""

    op: str
    implementation: str
    target: int
    module: str
    kernel: str
    key: str
    signature: dict[str, str] = field(hash=False, compare=False)
    constants: dict[Any, Any] = field(hash=False, compare=False)
    attributes: dict[Any, Any] = field(hash=False, compare=False)
    options: dict[str, Any] = field(hash=False, compare=False)


def record_launches(
    op: str, implementation: str, calls: Iterable[Call], targets: Iterable[int] = tuple(TARGETS)
) -> list[Launch]:
    """The distinct launches that an implementation makes at these calls on GPUs of these targets. Takes no memory.

    Raises: as `compile_ahead_of_time`.
    """
    if INTERPRETED:
        raise RuntimeError("nothing can be compiled in a process with TRITON_INTERPRET=1")
    calls = list(calls)
    found: dict[Launch, None] = {}
    for target in targets:
        with absent_gpu(TARGETS[target]), _recording(op, implementation, target, found):
            function = load_function(op, get_implementation(op, implementation))
            for call in calls:
                run_on_meta(get_op(op), function, call)
    return list(found)


@contextlib.contextmanager
def compiling_only(device: torch.device) -> Iterator[None]:
    """Within it a launch of a Triton kernel compiles it for this GPU, into Triton's cache on disk, and is not made.

    What runs within gets meta tensors: no memory is taken and nothing is computed.
    """
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_it(self: JITFunction[Any], *args: Any, grid: object, warmup: bool, **kwargs: Any) -> object:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        _compile_launcher(kernel)
        return kernel

    with absent_gpu(gpu_of(device)), mock.patch.object(JITFunction, "run", compile_it):
        yield


@functools.cache
def _compile_launcher(kernel: Any) -> None:
    """Compiles what launches a kernel, too: up to Triton 3.6 a module in C for every signature, 0.2 s each, which
    otherwise whoever launches it first does, one after the other."""
    from triton.runtime.driver import driver

    driver.active.launcher_cls(kernel.src, kernel.metadata)


@contextlib.contextmanager
def launching_nothing(device: torch.device) -> Iterator[None]:
    """Within it a launch of a Triton kernel does nothing. What runs within gets meta tensors and plans for this GPU."""
    with absent_gpu(gpu_of(device)), contextlib.ExitStack() as stack:
        if importlib.util.find_spec("triton") is not None:
            from triton.runtime.jit import JITFunction

            stack.enter_context(mock.patch.object(JITFunction, "run", return_value=None))
        yield


def compile_launches(launches: Iterable[Launch], processes: int = 2) -> list[CompiledKernel]:
    """Compiles launches in processes of their own; what several implementations or calls share is compiled once."""
    launches = list(launches)
    distinct = {(launch.module, launch.kernel, launch.target, launch.key): launch for launch in launches}
    with (
        tempfile.TemporaryDirectory(prefix="llmmed-compile-") as folder,
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _prepare_worker, (folder,)) as pool,
    ):
        compiled = dict(zip(distinct, pool.map(_compile, distinct.values()), strict=True))
    found = [(launch, compiled[launch.module, launch.kernel, launch.target, launch.key]) for launch in launches]
    return [replace(kernel, op=launch.op, implementation=launch.implementation) for launch, kernel in found]


def run_on_meta(
    op: Op, function: Callable[..., Any], call: Call, arriving: Callable[[Tensor], Tensor] = torch.empty_like
) -> None:
    """One forward and backward pass on meta tensors; `arriving` makes the gradient of an output."""
    tensors = {n: spec.empty("meta").requires_grad_(spec.requires_grad) for n, spec in call.tensors.items()}
    outputs = function(**(dict(call.arguments) | tensors))
    flowing = [o for o in ([outputs] if isinstance(outputs, Tensor) else outputs) if o.requires_grad]
    leaves = [tensor for name, tensor in tensors.items() if name in op.differentiable and tensor.requires_grad]
    if flowing and leaves:
        torch.autograd.grad(flowing, leaves, [arriving(output) for output in flowing])


@contextlib.contextmanager
def _recording(op: str, implementation: str, target: int, found: dict[Launch, None]) -> Iterator[None]:
    """Within it a launch of a Triton kernel is written down instead."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", target, 32))

    def record(self: JITFunction[Any], *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        _, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        parts = repr((signature, constants, attributes, sorted(options.items())))
        key = hashlib.sha256(parts.encode()).hexdigest()
        name = self.fn.__name__
        launch = Launch(
            op, implementation, target, self.fn.__module__, name, key, signature, constants, attributes, options
        )
        found.setdefault(launch)

    with mock.patch.object(JITFunction, "run", record):
        yield


def _prepare_worker(cache_folder: str) -> None:
    """Triton keeps no log of what it finds in its cache, so that nothing may be found there."""
    from triton import knobs

    knobs.cache.dir = cache_folder
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True


def _compile(launch: Launch) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function: JITFunction[Any] = getattr(importlib.import_module(launch.module), launch.kernel)
    language = GluonASTSource if function.is_gluon() else ASTSource
    source = language(function, launch.signature, launch.constants, launch.attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", launch.target, 32), options=launch.options)
    code = {stage: compiled.asm[stage] for stage in ("ttgir", "ptx")} if function.is_gluon() else {}
    return CompiledKernel(
        launch.op,
        launch.implementation,
        launch.kernel,
        launch.target,
        _describe_constants(launch, inspect.signature(function.fn)),
        *_resources(log.getvalue(), launch.kernel),
        compiled.metadata.shared,
        "wgmma.mma_async instructions are serialized" in log.getvalue(),
        code,
    )


def _describe_constants(launch: Launch, signature: inspect.Signature) -> str:
    names = list(signature.parameters)
    values = {names[path[0]]: value for path, value in launch.constants.items()} | launch.options
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _resources(log: str, kernel: str) -> tuple[int, int, int]:
    """Registers, spill stores and spill loads out of what ptxas prints with `-v`."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas does not say what {kernel} takes: {log.strip() or 'it printed nothing'}")
    return int(registers[1]), int(spills[1]), int(spills[2])
