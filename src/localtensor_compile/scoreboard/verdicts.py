"""Compares what a case gave with the unsharded op: a verdict each for forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..check.compare import compare
from .engines import Result, Results

EQUAL = "equal"  # the same bits on every rank
CLOSE = "close"  # within the tolerance
WRONG = "wrong"
FAILS = "fails"
RANDOM = "random"  # another draw: shape and dtype are right
NONE = "none"  # nothing to compare: no gradient, or not run
RIGHT = frozenset({EQUAL, CLOSE, RANDOM, NONE})

# A sum over shards has another order. float32 errors grow with the size of what is added up, so
# that the largest value counts besides the one compared.
_RELATIVE = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3}


@dataclass
class Verdict:
    """`error` is the largest absolute difference; `fault` is set by attribution."""

    kind: str
    error: float | None = None
    reason: str | None = None
    fault: str | None = None

    @property
    def right(self) -> bool:
        return self.kind in RIGHT

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}


def judge(found: Results, expected: Result, random: bool = False) -> tuple[Verdict, Verdict]:
    """Forward and backward on all ranks against the unsharded op."""
    return (
        _judge("forward", found, expected, random),
        _judge("backward", found, expected, random),
    )


def is_right(found: Results, expected: Result, random: bool = False) -> bool:
    return all(verdict.right for verdict in judge(found, expected, random))


def same_bits(a: Result, b: Result) -> bool:
    """Whether two ranks, or a rank on two engines, have the same values."""
    if (a.error is None) != (b.error is None):
        return False
    for x, y in ((a.forward, b.forward), (a.backward, b.backward)):
        if (x is None) != (y is None):
            return False
        if x is not None and y is not None and _compare(x, y, False).kind != EQUAL:
            return False
    return True


def _judge(part: str, found: Results, expected: Result, random: bool) -> Verdict:
    wanted = getattr(expected, part)
    worst = Verdict(NONE)
    for rank, result in sorted(found.items()):
        values = getattr(result, part)
        if values is None and result.error is not None:
            if part == "backward" and result.forward is None:
                return Verdict(NONE)  # the forward has the error
            return Verdict(FAILS, reason=result.error)
        if values is None and wanted is None:
            verdict = Verdict(NONE)
        elif values is None or wanted is None:
            missing = "no input has a gradient" if values is None else "inputs have gradients"
            verdict = Verdict(WRONG, reason=f"{missing}, other than in the unsharded op")
        else:
            verdict = _compare(values, wanted, random)
            if verdict.kind == WRONG:
                verdict.reason = f"rank {rank}: {verdict.reason}"
        worst = max(worst, verdict, key=_severity)
    return worst


def _severity(verdict: Verdict) -> tuple[int, float]:
    return (NONE, EQUAL, RANDOM, CLOSE, WRONG, FAILS).index(verdict.kind), verdict.error or 0.0


def _compare(values: Sequence[Any], wanted: Sequence[Any], random: bool) -> Verdict:
    if len(values) != len(wanted):
        return Verdict(WRONG, reason=f"{len(values)} values instead of {len(wanted)}")
    worst = Verdict(NONE)
    for value, target in zip(values, wanted):
        worst = max(worst, _compare_one(value, target, random), key=_severity)
    return worst


def _compare_one(value: Any, target: Any, random: bool) -> Verdict:
    # A gradient that torch leaves out is zero.
    if value is None and isinstance(target, Tensor):
        value = torch.zeros_like(target)
    if target is None and isinstance(value, Tensor):
        target = torch.zeros_like(value)
    if not isinstance(target, Tensor) or not isinstance(value, Tensor):
        # A 0-dim tensor where torch gives a number, or the other way round, is the same number.
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        same = value == target or value is target or (value != value and target != target)
        return Verdict(EQUAL) if same else Verdict(WRONG, reason=f"{value!r} instead of {target!r}")
    if random:
        if value.shape == target.shape and value.dtype == target.dtype:
            return Verdict(RANDOM)
        return Verdict(WRONG, reason=f"{_shape(value)} instead of {_shape(target)}")
    result = compare(value, target)
    if result.kind == "bit-equal":
        return Verdict(EQUAL)
    if result.kind != "differs":
        return Verdict(WRONG, reason=f"{_shape(value)} instead of {_shape(target)}")
    if result.close or result.max_abs <= _tolerance(target):
        return Verdict(CLOSE, error=result.max_abs)
    index, actual, right = result.first or ((), None, None)
    reason = (
        f"{result.mismatches} of {result.numel} values differ, by up to {result.max_abs:.3g}; "
        f"the first at {list(index)}: {actual!r} instead of {right!r}"
    )
    return Verdict(WRONG, error=result.max_abs, reason=reason)


def _tolerance(target: Tensor) -> float:
    relative = _RELATIVE.get(target.dtype)
    if relative is None:
        return 0.0
    sizes = target.detach().abs().to(torch.float64)
    finite = sizes[sizes.isfinite()]
    return relative * max(1.0, float(finite.max()) if finite.numel() else 0.0)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
