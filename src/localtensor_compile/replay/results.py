"""Whether a replayed program returns what it returned when it was captured, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..check.compare import compare


@dataclass(frozen=True)
class Outcome:
    """What one rank's program of one graph gave.

    Attributes:
        values: how many results and changed inputs were compared.
        different: what differs from the capture, in words; empty if nothing does.
    """

    title: str
    rank: int
    values: int
    different: tuple[str, ...]


def outcome(
    title: str, rank: int, saved: Mapping[str, Any], inputs: Sequence[Any], results: Sequence[Any]
) -> Outcome:
    """Compare a program's results, and the inputs it wrote to, with what was saved."""
    different = []
    for what, wanted, found in (
        ("result", saved["returned"], results),
        ("changed input", saved["changed"], inputs),
    ):
        for index, value in wanted.items():
            text = _difference(found[index], value)
            if text:
                different.append(f"{what} {index}: {text}")
    count = len(saved["returned"]) + len(saved["changed"])
    return Outcome(title, rank, count, tuple(different))


def _difference(found: Any, wanted: Any) -> str:
    if not isinstance(wanted, Tensor):
        return "" if found == wanted else f"{found} instead of {wanted}"
    if not isinstance(found, Tensor):
        return f"{found} instead of a tensor"
    result = compare(found.detach().cpu(), wanted.cpu())
    if result.kind == "bit-equal":
        return ""
    if result.kind != "differs":
        before, after = (
            getattr(result, f"expected_{result.kind}"),
            getattr(result, f"actual_{result.kind}"),
        )
        return f"{result.kind} {after} instead of {before}"
    return f"{result.mismatches} of {result.numel} values differ, by up to {result.max_abs:.2g}"
