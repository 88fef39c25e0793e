"""Functions for a Python prompt: one op, PyTorch against Triton, verified, then timed forward + backward, in ms.

They run in this process; `scripts/benchmark.py` survives kernels that crash, and compares every implementation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import torch
from rich.table import Table

from llmmed import consoles
from llmmed.autotune.failures import classify
from llmmed.autotune.measure import Measurement, measure_op
from llmmed.autotune.tuner import tune
from llmmed.autotune.verify import forget, verify
from llmmed.autotune.workload import record_workload
from llmmed.compose import compose
from llmmed.config import Config
from llmmed.errors import UserError
from llmmed.kernels.base import Call, TensorSpec, Unavailable, tensor_spec
from llmmed.kernels.catalog import DEFAULT, get_implementation, get_op, load_function
from llmmed.kernels.operator import INTERPRETED
from llmmed.reporting.numbers import ABSENT, digits
from llmmed.training import prepare_backend, resolve_compile

TRITON = "triton"
IGNORE_INDEX = -100


class Comparison(TypedDict):
    """What a benchmark found. Times in ms, forward + backward; None where there is none, and `reason` says why."""

    pytorch_time: float | None
    triton_time: float | None
    speedup: float | None  # pytorch_time / triton_time
    use_triton: bool  # verified, and faster by more than the noise
    reason: str


def benchmark_rms_norm(batch_size: int = 32, seq_len: int = 512, d_model: int = 768) -> Comparison:
    """RMSNorm over [batch_size, seq_len, d_model]."""
    weight = tensor_spec(d_model, dtype=torch.float32, requires_grad=True)
    return _compare(Call.of("rms_norm", x=_states(batch_size, seq_len, d_model), weight=weight, eps=1e-6))


def benchmark_add_rms_norm(batch_size: int = 32, seq_len: int = 512, d_model: int = 768) -> Comparison:
    """Residual addition and RMSNorm over [batch_size, seq_len, d_model]."""
    states = _states(batch_size, seq_len, d_model)
    weight = tensor_spec(d_model, dtype=torch.float32, requires_grad=True)
    return _compare(Call.of("add_rms_norm", x=states, residual=states, weight=weight, eps=1e-6))


def benchmark_rotary(batch_size: int = 32, seq_len: int = 512, n_heads: int = 12, d_head: int = 64) -> Comparison:
    """Rotary positions on queries and keys, each [batch_size, seq_len, n_heads, d_head]."""
    states = _states(batch_size, seq_len, n_heads, d_head)
    table = tensor_spec(seq_len, d_head // 2, dtype=torch.float32)
    return _compare(Call.of("rotary", q=states, k=states, cos=table, sin=table))


def benchmark_rotary_attention(
    batch_size: int = 8, seq_len: int = 512, n_heads: int = 12, d_head: int = 64
) -> Comparison:
    """Rotary positions and causal attention of a fused projection [batch_size, seq_len, 3 n_heads, d_head]."""
    table = tensor_spec(seq_len, d_head // 2, dtype=torch.float32)
    qkv = _states(batch_size, seq_len, 3 * n_heads, d_head)
    return _compare(Call.of("rotary_attention", qkv=qkv, cos=table, sin=table, n_heads=n_heads))


def benchmark_swiglu(batch_size: int = 32, seq_len: int = 512, d_ff: int = 2048) -> Comparison:
    """SwiGLU's activation of a fused projection [batch_size, seq_len, 2 d_ff], as the model calls it."""
    return _compare(Call.of("swiglu", gate=_states(batch_size, seq_len, 2 * d_ff), up=None))


def benchmark_swiglu_mlp(batch_size: int = 8, seq_len: int = 512, d_model: int = 768, d_ff: int = 2048) -> Comparison:
    """SwiGLU feed-forward network, products included, over [batch_size, seq_len, d_model]."""

    def weight(rows: int, cols: int) -> TensorSpec:
        return tensor_spec(rows, cols, dtype=_dtype(), requires_grad=True)

    x = _states(batch_size, seq_len, d_model)
    weights = {"gate_up_weight": weight(2 * d_ff, d_model), "down_weight": weight(d_model, d_ff)}
    return _compare(Call.of("swiglu_mlp", x=x, **weights))


def benchmark_attention(batch_size: int = 8, seq_len: int = 512, n_heads: int = 12, d_head: int = 64) -> Comparison:
    """Causal attention over queries, keys and values, each [batch_size, seq_len, n_heads, d_head]."""
    states = _states(batch_size, seq_len, n_heads, d_head)
    return _compare(Call.of("attention", q=states, k=states, v=states))


def benchmark_cross_entropy(batch_size: int = 8, seq_len: int = 512, vocab_size: int = 16_384) -> Comparison:
    """Cross-entropy of logits [batch_size * seq_len, vocab_size]."""
    rows = batch_size * seq_len
    return _compare(
        Call.of(
            "cross_entropy",
            logits=_states(rows, vocab_size),
            targets=tensor_spec(rows, dtype=torch.int64),
            ignore_index=IGNORE_INDEX,
            scale=None,
        )
    )


def benchmark_linear_cross_entropy(
    batch_size: int = 4, seq_len: int = 512, d_model: int = 768, vocab_size: int = 16_384
) -> Comparison:
    """Output head and cross-entropy: hidden states [batch_size * seq_len, d_model], weight [vocab_size, d_model]."""
    rows = batch_size * seq_len
    return _compare(
        Call.of(
            "linear_cross_entropy",
            hidden_states=_states(rows, d_model),
            weight=tensor_spec(vocab_size, d_model, dtype=torch.float32, requires_grad=True),
            targets=tensor_spec(rows, dtype=torch.int64),
            ignore_index=IGNORE_INDEX,
            scale=None,
        )
    )


def benchmark_newton_schulz(n_matrices: int = 4, rows: int = 384, cols: int = 1536) -> Comparison:
    """Muon's orthogonalisation of [n_matrices, rows, cols] in bfloat16; it has no backward pass."""
    return _compare(Call.of("newton_schulz", G=tensor_spec(n_matrices, rows, cols, dtype=torch.bfloat16)))


BENCHMARKS: dict[str, Callable[..., Comparison]] = {
    "add_rms_norm": benchmark_add_rms_norm,
    "attention": benchmark_attention,
    "cross_entropy": benchmark_cross_entropy,
    "linear_cross_entropy": benchmark_linear_cross_entropy,
    "newton_schulz": benchmark_newton_schulz,
    "rms_norm": benchmark_rms_norm,
    "rotary": benchmark_rotary,
    "rotary_attention": benchmark_rotary_attention,
    "swiglu": benchmark_swiglu,
    "swiglu_mlp": benchmark_swiglu_mlp,
}


def manual_kernel_benchmark(**sizes: int) -> dict[str, Comparison]:
    """Every op at its default sizes, printed as a table and returned by op.

    Args:
        **sizes: `batch_size=8`, `d_model=1024`, ...: for every op that has such a size.

    Raises:
        UserError: no op has a size of that name.
    """
    names = {op: function.__annotations__ for op, function in BENCHMARKS.items()}
    known = sorted({name for each in names.values() for name in each if name != "return"})
    for size in sizes:
        if size not in known:
            raise UserError(f"manual_kernel_benchmark({size}=...): there is no such size; there are {', '.join(known)}")
    console = consoles.output()
    found: dict[str, Comparison] = {}
    with console.status("benchmarking") as status:
        for op, function in BENCHMARKS.items():
            status.update(f"benchmarking {op}")
            found[op] = function(**{name: value for name, value in sizes.items() if name in names[op]})
    console.print(_table(found))
    where = torch.cuda.get_device_name() if _device().type == "cuda" else "this CPU"
    console.print(f"\nforward + backward in {str(_dtype()).removeprefix('torch.')} on {where}")
    return found


def auto_select_kernels(cfg: Config | Sequence[str] = ()) -> dict[str, str]:
    """Tunes as a run does, and returns the implementation chosen for each op that the run calls.

    Args:
        cfg: A configuration, or overrides as on the command line: `["model=base", "train.precision=bf16"]`.

    Raises:
        UserError: a mistake in the configuration, or something forced that cannot be used.
    """
    config = cfg if isinstance(cfg, Config) else compose(cfg)
    precision = torch.get_float32_matmul_precision()
    try:
        prepare_backend(config)
        return dict(tune(config, record_workload(config), mode=resolve_compile(config)).choice)
    finally:
        torch.set_float32_matmul_precision(precision)


def _compare(call: Call) -> Comparison:
    device, op = _device(), get_op(call.op)
    functions, reasons = {}, {}
    for name in (DEFAULT, TRITON):
        try:
            implementation = get_implementation(call.op, name)
            if reason := implementation.why_not(device, call.compute_dtype):
                raise Unavailable(reason)
            function = load_function(call.op, implementation)
        except Unavailable as error:
            reasons[name] = str(error)
            continue
        verdict = verify(op, implementation, function, [call], device)
        if verdict.status == "verified":
            functions[name] = function
        else:
            reasons[name] = f"{verdict.status.replace('_', ' ')}: {verdict.reason}"
    forget()

    def failed(name: str, error: Exception) -> None:
        status, reason = classify(error)
        reasons[name] = f"{status.replace('_', ' ')}: {reason}, while measured"

    found = measure_op(
        op, functions, {call: 1}, device=device, mode="eager", ceilings=None, turn=lambda name: None, failed=failed
    )
    return _judged(found, reasons)


def _judged(found: Mapping[str, Measurement], reasons: Mapping[str, str]) -> Comparison:
    pytorch, triton = found.get(DEFAULT), found.get(TRITON)
    speedup, faster = None, False
    if pytorch is not None and triton is not None:
        speedup, faster = pytorch.total_ms / triton.total_ms, triton.total_ms_high < pytorch.total_ms_low
    return Comparison(
        pytorch_time=pytorch.total_ms if pytorch else None,
        triton_time=triton.total_ms if triton else None,
        speedup=speedup,
        use_triton=faster,
        reason="; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
    )


def _table(found: Mapping[str, Comparison]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("op", no_wrap=True)
    for header in ("PyTorch\nms", "Triton\nms", "speed-\nup"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("use", no_wrap=True)
    table.add_column("why", overflow="fold")
    for op, each in found.items():
        speedup = ABSENT if each["speedup"] is None else f"{each['speedup']:.2f}"
        times = (digits(each[key]) or ABSENT for key in ("pytorch_time", "triton_time"))
        table.add_row(op, *times, speedup, "Triton" if each["use_triton"] else "PyTorch", each["reason"])
    return table


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def _dtype() -> torch.dtype:
    return torch.bfloat16 if _device().type == "cuda" else torch.float32


def _states(*shape: int) -> TensorSpec:
    try:
        shape = tuple(map(operator.index, shape))
    except TypeError:
        shape = (0,)
    if min(shape) < 1:
        raise ValueError("sizes are whole numbers from 1 up")
    return tensor_spec(*shape, dtype=_dtype(), requires_grad=True)
