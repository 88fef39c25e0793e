"""What the gate allows: how far a result may lie from the float64 truth, given how far PyTorch's own lies.

A candidate passes if, for every output and gradient, as a whole and by parts,

* the L2 norm of its error is at most 2 x the default's + eps / 4 x the truth's, and
* every element's error is at most 4 x the default's largest + 2 eps |truth|,

where eps belongs to the result's dtype. A float32 result is allowed 32 eps (one element: 128) of its usual size: there
eps is not the rounding of the result but that of every step, and orders of summing differ: a plain sum over 1,000 rows
is off by 6 eps, one of its elements by 30. TF32 would be off by 4,000. Where everything cancels, as in the gradient of
a saturated softmax, PyTorch itself is off by tens or hundreds of eps in float32, and luck and the order of steps
decide: there up to 8 times its error counts, in float32 only.

Parts are blocks of rows, blocks of columns and what the op itself names: an error in one corner drowns in the whole. In
a block, the default's error and the truth are taken to be no smaller than they are on average, so that a place where
the default is right by luck, or where everything cancels, condemns nobody. In the parts that the op names nothing is
averaged. All of a named part, or of the results for a single row, may hang on one number that was rounded once: half an
eps of the compute dtype is free there. A result of a single element, such as a loss, gets a rounding or two of its own,
as many times larger as it is ill-conditioned. The constants come from `scripts/calibrate_gate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_FACTOR, _FACTOR_ELEMENT = 2.0, 4.0  # times the default's error; the largest of many varies more than their norm
_FREE = 0.25  # eps of the L2 norm that need no excuse
_FREE_FLOAT32 = 32.0
_CANCELS, _MOST_LENIENT = 8.0, 8.0  # in float32, from this conditioning on, and up to this factor
_MOST_AMPLIFIED = 1e4  # a rounding, in a result that cancels
_BLOCKS = 8  # of rows and of columns
DEFAULT_LIMIT = 1e-2  # of the default's own relative error in float32, where it is what others are measured by
# In 16 bits the default's relative error counts for no more than this, plus what rounding explains: a loose default
# must not excuse anything.
_CEILING = {torch.float32: math.inf, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class Finding:
    """The worst of one comparison: error over bound (1 is the limit), and where, for the user."""

    ratio: float
    message: str

    def __post_init__(self) -> None:
        if math.isnan(self.ratio):  # it would be smaller than any limit
            object.__setattr__(self, "ratio", math.inf)


@dataclass(frozen=True)
class Truth:
    """What one result is held against.

    Args:
        value: The truth, in float64.
        default: PyTorch's result.
        conditioning: The relative error of PyTorch's result in float32, in units of float32's eps: large where nobody
            can be exact.
        masks: Further parts by name, boolean masks of the result's shape.
        one_row: Whether the call has a single row of values, so that one rounding may be in all of the result.
    """

    value: Tensor
    default: Tensor
    conditioning: float
    masks: Mapping[str, Tensor]
    one_row: bool = False


def judge(name: str, truth: Truth, found: Tensor, dtype: torch.dtype) -> tuple[Finding, float]:
    """The worst finding about one result (same shape and dtype as the default's), and its relative L2 error.

    `name` is what the message calls it; `dtype` is the compute dtype.
    """
    value = truth.value
    error, base = found.double() - value, truth.default.double() - value
    eps, compute_eps = torch.finfo(found.dtype).eps, torch.finfo(dtype).eps
    names, counts, sums, sizes = _parts(error, base, value, truth.masks)
    norms = sums.sqrt()  # [parts, 3]
    if dtype == torch.float32:
        trusted = torch.full_like(norms[0, 0], min(max(1.0, truth.conditioning / _CANCELS), _MOST_LENIENT))
    else:
        # How much of its error counts: all of it where the truth is zero, and nothing else tells what is small.
        ceiling = _CEILING[dtype] + 4 * compute_eps * truth.conditioning
        trusted = (ceiling * norms[0, 2] / norms[0, 1].clamp(min=1e-300)).clamp(max=1.0)
        trusted = torch.where(norms[0, 2] > 0, trusted, 1.0)
    amplified = min(max(1.0, truth.conditioning), _MOST_AMPLIFIED) if value.numel() == 1 else 1.0
    roundings = 2 * compute_eps * amplified
    element = _element(value, base, error, trusted, eps, roundings)
    # Read from the device at once: a GPU is slow to be asked.
    finite = found.isfinite().sum().double()
    trust, finite_count, ratio, off, limit, *rest = torch.cat(
        [torch.stack([trusted, finite]), element, sizes, norms.flatten()]
    ).tolist()
    if finite_count < found.numel():
        count = found.numel() - int(finite_count)
        return Finding(math.inf, f"{name}: {count} of {found.numel()} elements are not finite"), math.inf
    counts += map(int, rest[: len(sizes)])
    rest = rest[len(sizes) :]
    parts = [_Part(n, c, *rest[3 * i : 3 * i + 3]) for i, (n, c) in enumerate(zip(names, counts, strict=True))]
    whole = parts[0]
    free = eps * (_FREE_FLOAT32 if found.dtype == torch.float32 else _FREE)
    findings = []
    for part in parts:
        named = part.name in truth.masks
        share = 0.0 if named else math.sqrt(part.count / max(1, whole.count))
        base_size = trust * max(part.base, share * whole.base)
        few = roundings / max(1, part.count)
        once = compute_eps / 2 if named or truth.one_row else 0.0
        allowed = _FACTOR * base_size + (free + few + once) * max(part.truth, share * whole.truth)
        findings.append(_finding(f"{name}{f' in {part.name}' if part.name else ''}", part.error, allowed, part.truth))
    findings.append(Finding(ratio, f"{name}: error of one element {off:.1e}, allowed {limit:.1e}"))
    worst = max(findings, key=lambda finding: finding.ratio)
    if findings[0].ratio > 1:  # the plainest thing to say
        worst = Finding(worst.ratio, findings[0].message)
    return worst, _ratio(whole.error, whole.truth)


def judge_default(name: str, error: float, dtype: torch.dtype) -> Finding:
    """The finding about a default's relative error, which nothing else is measured against: in float32 alone, where
    even what cancels is right to 5e-3. Where the truth is zero, the error says nothing.
    """
    if dtype != torch.float32 or not math.isfinite(error):
        return Finding(0.0, name)
    return Finding(
        error / DEFAULT_LIMIT, f"{name}: relative error {error:.1e}, allowed {DEFAULT_LIMIT:.0e} even for a default"
    )


def relative(error: Tensor, truth: Tensor) -> float:
    """|error| / |truth| in the L2 norm; where the truth is zero, any error is infinite."""
    return _ratio(error.norm().item(), truth.norm().item())


def _ratio(error: float, size: float) -> float:
    return error / size if size else (math.inf if error else 0.0)


def _finding(name: str, error: float, allowed: float, size: float) -> Finding:
    kind, unit = ("relative error", size) if size else ("error", 1.0)
    return Finding(_ratio(error, allowed), f"{name}: {kind} {error / unit:.1e}, allowed {allowed / unit:.1e}")


def _element(truth: Tensor, base: Tensor, error: Tensor, trust: Tensor, eps: float, roundings: float) -> Tensor:
    """The worst single element: the ratio of its error to what is allowed, the error, and that."""
    if not truth.numel():
        return error.new_zeros(3)
    # A handful of elements may meet a default that is right by luck: they get a rounding or two of their own.
    few = roundings / truth.numel() * truth.abs().max()
    if eps == torch.finfo(torch.float32).eps:
        few = few + _FACTOR_ELEMENT * _FREE_FLOAT32 * eps * truth.square().mean().sqrt()
    allowed = _FACTOR_ELEMENT * trust * base.abs().max() + few + 2 * eps * truth.abs()
    ratios = torch.where(error == 0, 0.0, error.abs() / allowed).flatten()
    at = ratios.argmax().view(1)  # an index of one dimension stays on the device
    return torch.cat([each.flatten().index_select(0, at) for each in (ratios, error.abs(), allowed)])


@dataclass(frozen=True)
class _Part:
    """L2 norms over a part of a result, and how many elements it has."""

    name: str
    count: int
    error: float
    base: float
    truth: float


def _parts(
    error: Tensor, base: Tensor, truth: Tensor, masks: Mapping[str, Tensor]
) -> tuple[list[str], list[int], Tensor, Tensor]:
    """The whole, without a name, then its parts: names, how many elements each has, sums of squares [parts, 3].

    The masks' parts come last; how many elements those have is on the device, [masks].
    """
    squares = torch.stack([error, base, truth]).square()
    names, counts, sums = [""], [truth.numel()], [squares.reshape(3, -1).sum(1, keepdim=True)]
    if truth.ndim:
        table = squares.reshape(3, -1, truth.shape[-1])
        for axis, label in ((1, "row"), (2, "column")):
            size = table.shape[axis]
            if size < 2:
                continue
            lines = table.sum(3 - axis)  # [3, size]
            step = -(-size // _BLOCKS)
            blocks = -(-size // step)
            sums.append(torch.nn.functional.pad(lines, (0, blocks * step - size)).view(3, blocks, step).sum(2))
            for start in range(0, size, step):
                end = min(start + step, size)
                names.append(f"{label} {start}" if end - start == 1 else f"{label}s {start} to {end - 1}")
                counts.append((end - start) * truth.numel() // size)
    names += masks
    sums += [(squares * mask).reshape(3, -1).sum(1, keepdim=True) for mask in masks.values()]
    sizes = [mask.sum().double() for mask in masks.values()]
    return names, counts, torch.cat(sums, 1).T, torch.stack(sizes) if sizes else error.new_zeros(0)
