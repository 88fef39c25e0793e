"""Where the time of a training step goes, by what is computed: PyTorch's profiler, its kernels put into groups.

A kernel's own name decides where it can: products, attention, a compiler's fused kernels, which carry the names of what
they compute. Elementwise kernels of eager mode do not tell; there the operator that launched them decides, and what
encloses it: the optimizer, or a range that `annotated` puts around a part of the model. A backward kernel belongs where
the forward operator of its autograd node stood. What is left is `other`: casts, copies, sums, the embedding.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

_RANGE = "part of the step: "
_RANGES = (_RANGE, "Optimizer.", "ProfilerStep")  # around operators
_OPTIMIZER = re.compile(r"^Optimizer\.step")
_RULES = tuple(  # in this order: a fused kernel's name may match several
    (group, re.compile(pattern, re.IGNORECASE))
    for group, pattern in (
        ("optimizer", r"adam|multi_tensor|_foreach_|newton_schulz|muon|lpnorm|vector_norm"),
        ("attention", r"flash|fmha|sdpa|attention|attn|cudnn::fusion"),  # the last: cuDNN's backward, in three kernels
        ("loss", r"cross_entropy|softmax|nll_loss|logsumexp"),
        ("norm", r"rms_?norm|rsqrt"),
        ("swiglu", r"swiglu|silu|sigmoid"),
        ("rotary", r"rotary|rope|triton_\w*_cat(_|$)"),
        ("products", r"gemm|gemv|nvjet|cutlass|cublas|xmma|matmul|aten::(mm|bmm|addmm|baddbmm)\b|splitk"),
    )
)
_KERNELS, _NAME = 30, 120  # that are told of by themselves; of a name, so many characters
_AUTOGRAD = "autograd::engine::evaluate_function"


class Breakdown(NamedTuple):
    """Device time of one step in ms: by group, on a CPU the time in operators; and of its largest kernels, by name."""

    groups: dict[str, float]
    largest: dict[str, float]


def measure_breakdown(step: Callable[[], object], count: int, device: torch.device) -> Breakdown:
    """That of `count` profiled steps, for one."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = list(profiler.events())
    found = group_events(events, on_gpu=device.type == "cuda"), largest_kernels(events)
    return Breakdown(*({name: took / count / 1e3 for name, took in each.items()} for each in found))


def largest_kernels(events: list[FunctionEvent]) -> dict[str, float]:
    """Microseconds of the kernels that take most, by the beginning of their names; none on a CPU."""
    took: defaultdict[str, float] = defaultdict(float)
    for name, microseconds in _by_kernel(events).items():
        took[name[:_NAME]] += microseconds
    return dict(sorted(took.items(), key=lambda each: -each[1])[:_KERNELS])


def _by_kernel(events: list[FunctionEvent]) -> defaultdict[str, float]:
    took: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            took[event.name] += event.self_device_time_total
    return took


def group_events(events: list[FunctionEvent], *, on_gpu: bool) -> dict[str, float]:
    """Microseconds by group."""
    forward = _forward_events(events)
    found: defaultdict[str, float] = defaultdict(float)
    cpu_events = [event for event in events if event.device_type == DeviceType.CPU]
    if not on_gpu:
        for event in cpu_events:
            if not event.name.startswith(_RANGES):
                found[_group(event.name, event, forward)] += event.self_cpu_time_total
        return dict(found)
    took = _by_kernel(events)  # what launchers tell says only whose it was
    # A range tells of a kernel again that an operator within it has told of; of some, only the range does.
    for within_range in (False, True):
        told: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        for event in cpu_events:
            if event.name.startswith(_RANGES) is within_range:
                for kernel in event.kernels:
                    if kernel.name in took:  # ranges of the user have a twin on the device, which is no kernel
                        told[kernel.name][_group(kernel.name, event, forward)] += kernel.duration
        for name, groups in told.items():
            share = min(1.0, took[name] / max(sum(groups.values()), 1e-9))
            for group, microseconds in groups.items():
                found[group] += microseconds * share
            took[name] -= share * sum(groups.values())
    for name, microseconds in took.items():  # what a graph replays, nobody launched
        found[_by_name(name) or "other"] += max(0.0, microseconds)
    return dict(found)


@contextlib.contextmanager
def annotated(
    model: nn.Module,
    classes: Mapping[str, str] | None = None,
    functions: Mapping[tuple[ModuleType, str], str] | None = None,
) -> Iterator[None]:
    """Puts ranges around the calls of modules, by the name of their class, and of functions of a module."""
    handles = []
    for module in model.modules():
        group = (classes or {}).get(type(module).__name__)
        if group is not None:
            entered: list[record_function] = []
            before = functools.partial(_enter, group, entered)
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(_leave(entered))]
    originals = {}
    for (owner, name), group in (functions or {}).items():
        originals[owner, name] = getattr(owner, name)
        setattr(owner, name, in_range(originals[owner, name], group))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


def in_range(function: Callable[..., Any], group: str) -> Callable[..., Any]:
    """The same function, whose time counts for `group`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with record_function(_RANGE + group):
            return function(*args, **kwargs)

    return wrapped


def _enter(group: str, entered: list[record_function], *_: object) -> None:
    entered.append(record_function(_RANGE + group))
    entered[-1].__enter__()


def _leave(entered: list[record_function]) -> Callable[..., None]:
    def leave(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    return leave


def _group(name: str, launcher: FunctionEvent, forward: Mapping[int, FunctionEvent]) -> str:
    chain = list(_ancestors(launcher, forward))
    if any(_OPTIMIZER.search(each.name) for each in chain):
        return "optimizer"
    own = _by_name(name)
    if own is not None:
        return own
    for each in chain:
        if each.name.startswith(_RANGE):
            return each.name.removeprefix(_RANGE)
        inner = _by_name(each.name)
        if inner is not None:
            return inner
    return "other"


def _by_name(name: str) -> str | None:
    return next((group for group, pattern in _RULES if pattern.search(name)), None)


def _ancestors(event: FunctionEvent | None, forward: Mapping[int, FunctionEvent]) -> Iterator[FunctionEvent]:
    """An event and what encloses it; past an autograd node, the forward operator of that node and what enclosed it."""
    while event is not None:
        yield event
        if event.name.startswith(_AUTOGRAD):
            event = forward.get(event.sequence_nr)
        else:
            event = event.cpu_parent


def _forward_events(events: list[FunctionEvent]) -> dict[int, FunctionEvent]:
    """By sequence number, the operator that made the autograd node: the last that began with that number."""
    found = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        backward = event.name.startswith(("autograd::", _RANGE)) or event.fwd_thread not in (None, 0)
        if event.device_type == DeviceType.CPU and event.sequence_nr >= 0 and not backward:
            found[event.sequence_nr] = event
    return found
