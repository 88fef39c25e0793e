"""Compiles what tuning will need, on all cores at once, before the one process that tries and times it.

Each warm-up process makes a share of the calls once, forward and backward: Triton's on meta tensors, where a launch
compiles and does nothing else, those of `torch.compile` for real. What stays is in the compilers' caches on disk.
Nothing is judged here, since processes that share a GPU wait long for its answers. So what runs for real comes first;
then, while the process that judges is at it, op by op, what it needs next (`Board`); and last, at the lowest priority,
plans of the step (`StepAhead`). Whatever goes wrong here goes wrong again where it is judged.

`warming.py` starts it with the paths of a job and a folder; the processes that share a folder share the work.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmmed.autotune.board import ALL, CLOCK, Board
from llmmed.autotune.journal import Job, Task
from llmmed.autotune.launch_search import open_sites
from llmmed.autotune.measure import compiled_alone
from llmmed.autotune.plan import Mode
from llmmed.autotune.process_settings import offer_to_out_of_memory_killer, take_one_core, take_settings
from llmmed.autotune.step_ahead import StepAhead
from llmmed.autotune.trials import Layout, trials
from llmmed.autotune.verify import arriving, exact_products
from llmmed.kernels.ahead_of_time import compiling_only, run_on_meta
from llmmed.kernels.base import Call, Op
from llmmed.kernels.catalog import DEFAULT, get_implementation, get_op, load_function
from llmmed.kernels.operator import as_in_compiled_step
from llmmed.kernels.tunable import Launches
from llmmed.processes import end_with_parent

_NICE = 15  # the process that judges goes first
_LONG = 10  # the weight of what takes as long as all the rest on all cores


def main() -> None:
    end_with_parent()
    offer_to_out_of_memory_killer()
    os.nice(_NICE)
    take_one_core()
    job, board = Job.read(Path(sys.argv[1])), Board(Path(sys.argv[2]))
    device = torch.device(job.device)
    take_settings(job)
    step = StepAhead(job, board) if job.step is not None and job.mode != "eager" else None
    if step is not None:
        step.compile_default()
    units = sorted(_units(job.tasks, job.mode, device), key=_Unit.order)
    board.announce(Counter(unit.awaited_by for unit in units))
    for index, unit in enumerate(units):
        if not board.claim(str(index)):
            continue
        # A candidate may raise anything at all; it is judged elsewhere.
        began = time.perf_counter()
        with contextlib.suppress(Exception):
            unit.run(device)
            _leave(device)
        text = f"{time.perf_counter() - began:6.1f} {unit.name} {unit.call.describe()}"
        board.finish(unit.awaited_by, str(index), text)
    if step is not None:
        step.compile_flips()
    os._exit(0)


def _leave(device: torch.device) -> None:
    """Hands the GPU back: others are about to judge, and want its time and its memory."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Unit:
    """One call of a candidate that tuning will make: as the gate makes it, or compiled, as the clock does.

    All layouts belong to one unit, since they mostly share their kernels: two processes would compile the same twice.
    With `launches` it is a call as the search for launch parameters makes it, in a run that compiles its step
    `in_compiled_step`; `timed`, one of a candidate that the compiler writes anew for each shape and precision, as the
    clock makes it. `position` is the op's among the tasks.
    """

    op: Op
    name: str
    call: Call
    layouts: tuple[Layout, ...]
    compiled: bool
    launches: Launches = field(default_factory=dict)
    in_compiled_step: bool = False
    timed: bool = False
    position: int = 0

    @property
    def awaited_by(self) -> str:
        """The op whose candidates can be verified when this is done, or all, or the clock."""
        if self.launches or self.timed:
            return CLOCK
        return ALL if self.compiled or _per_shape(self.op.name, self.name) else self.op.name

    def order(self) -> tuple[int, int, int]:
        """First what runs on the GPU, which those who judge want for themselves; then op by op, as they come, after the
        few that would hold up all by themselves."""
        stage, weight = {ALL: 0, CLOCK: 2}.get(self.awaited_by, 1), self.weight()
        return stage, self.position if stage == 1 and weight < _LONG else -1, -weight

    def weight(self) -> int:
        """What takes longest comes first: `torch.compile`, then products in float32, unrolled without tensor cores, in
        tiles that hold whole heads even more so."""
        cost = self.op.cost(self.call)
        products = cost.forward_flops + cost.backward_flops > 0
        whole = self.compiled or _per_shape(self.op.name, self.name)
        exact = products and self.call.compute_dtype == torch.float32
        head_dim = max((spec.shape[-1] for spec in self.call.tensors.values() if len(spec.shape) == 4), default=0)
        return 3 * whole - bool(self.launches) + (2 + head_dim // 16) * exact + products

    def run(self, device: torch.device) -> None:
        implementation = get_implementation(self.op.name, self.name)
        if self.call.compute_dtype not in implementation.dtypes:
            return
        function = load_function(self.op.name, implementation)
        if self.compiled:
            run_once(self.op, torch.compile(function, fullgraph=True, dynamic=False), self.call, device)
            return
        if self.launches:
            implementation.take_launches(self.launches)
            with compiling_only(device), as_in_compiled_step(self.in_compiled_step):
                run_on_meta(self.op, function, self.call)
            implementation.take_launches({})
            return
        if implementation.per_shape:
            with contextlib.nullcontext() if self.timed else exact_products():
                run_once(self.op, function, self.call, device)
            return
        with exact_products(), compiling_only(device):  # which compile-time arguments depend on
            for layout in self.layouts:
                run_on_meta(self.op, function, self.call, lambda out, layout=layout: _arriving(out, layout))  # type: ignore[misc]


def _units(tasks: list[Task], mode: Mode, device: torch.device) -> Iterator[_Unit]:
    for position, task in enumerate(tasks):
        yield from (replace(unit, position=position) for unit in _units_of(task, mode, device))


def _units_of(task: Task, mode: Mode, device: torch.device) -> Iterator[_Unit]:
    op, calls = get_op(task.op), list(task.counts())
    for name in [*task.verify, *task.verified] if task.measure else ():
        implementation = get_implementation(task.op, name)
        if compiled_alone(implementation, mode):
            yield from (_Unit(op, name, call, ("contiguous",), compiled=True) for call in calls)
        elif implementation.per_shape:
            yield from (_Unit(op, name, call, ("contiguous",), compiled=False, timed=True) for call in calls)
    for name in task.verify:
        few, cases = _per_shape(task.op, name), task.cases(name)
        tried = trials(op, calls, None, device, few_shapes=few, cases=cases) if name != DEFAULT else ()
        layouts: dict[Call, dict[Layout, None]] = {}
        for trial in tried:
            layouts.setdefault(trial.call, {})[trial.layout] = None
        for call, found in layouts.items():
            yield _Unit(op, name, call, tuple(found), compiled=False)
    for name in task.verified:
        yield from (_Unit(op, name, call, ("contiguous",), compiled=False) for call in calls if name != DEFAULT)
    for name in (*task.verify, *task.verified):
        if name not in task.launches and name not in task.launched:
            yield from _searched(op, name, calls, mode, device)


def _searched(op: Op, name: str, calls: list[Call], mode: Mode, device: torch.device) -> Iterator[_Unit]:
    """What the search for an implementation's launch parameters tries; one that cannot be loaded here has nothing."""
    compiled_step = mode != "eager"
    with contextlib.suppress(Exception):
        implementation = get_implementation(op.name, name)
        function = load_function(op.name, implementation) if implementation.tunable else None
        with as_in_compiled_step(compiled_step):
            opened = open_sites(op, implementation, function, calls, device) if function is not None else []
        for each in opened:
            # The default is compiled for the gate as eager mode launches it.
            for values in [*([each.default] if compiled_step else []), *each.alternatives]:
                yield _Unit(
                    op, name, each.calls[0], ("contiguous",), compiled=False, launches={each.site: values},
                    in_compiled_step=compiled_step,
                )  # fmt: skip


def _per_shape(op: str, name: str) -> bool:
    return get_implementation(op, name).per_shape


def _arriving(output: Tensor, layout: Layout) -> Tensor:
    return arriving(torch.ones_like(output), output.dtype, layout)


def run_once(op: Op, function: Callable[..., Any], call: Call, device: torch.device) -> None:
    """One forward and backward pass over bland values."""
    generator = torch.Generator(device=device).manual_seed(0)
    inputs = op.make_inputs(call, op.regimes[0], generator, device)
    leaves = [inputs[n] for n, spec in call.tensors.items() if spec.requires_grad and n in op.differentiable]
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = function(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if leaves:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
