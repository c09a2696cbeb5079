"""Whose fault a wrong value or a failure is, found by running the same case without us.

Nothing is attributed by its text. An eager case runs again on real gloo ranks; a compiled one as
the unsharded op compiled alike, then compiled on real gloo ranks. What only we get wrong is ours.
"""

from __future__ import annotations

from collections.abc import Callable

from .cases import Case
from .engines import Result, Results
from .verdicts import is_right, same_bits

OURS = "ours"
DTENSOR = "DTensor"
COMPILER = "torch.compile"  # Dynamo or AOTAutograd: the unsharded op fails too
INDUCTOR = "Inductor"
FAULTS = (OURS, DTENSOR, COMPILER, INDUCTOR)

# A backend (None is eager) -> what the case gives there.
Plain = Callable[[Case, str | None], Result]
Real = Callable[[Case, str | None], Results]


def eager_fault(found: Results, real: Results, expected: Result, random: bool) -> tuple[str, str]:
    """(fault, what real ranks did) for a case that simulated ranks get wrong or fail in eager."""
    raised = _error(real)
    if _error(found) is not None:
        if raised is not None:
            return DTENSOR, f"real ranks: {raised}"
        if not is_right(real, expected, random):
            return DTENSOR, "real ranks get a wrong value"
        return OURS, "real ranks get it right"
    if raised is not None:
        return OURS, f"a wrong value where real ranks raise {raised}"
    if all(same_bits(found[rank], real[rank]) for rank in found):
        return DTENSOR, "real ranks get the same values"
    if is_right(real, expected, random):
        return OURS, "real ranks get it right"
    return OURS, "real ranks get it wrong too, but other values"


def compiled_fault(
    case: Case,
    backend: str,
    found: Results,
    expected: Result,
    random: bool,
    *,
    plain: Plain,
    real: Real,
    lower_is_right: bool,
) -> tuple[str, str]:
    """(fault, evidence) for a case that is right in eager and not with `backend`.

    Args:
        lower_is_right: whether it is right with aot_eager, so that only Inductor can be at fault.
    """
    culprit = INDUCTOR if backend == "inductor" and lower_is_right else COMPILER
    alone = plain(case, backend)
    if not is_right({0: alone}, expected, random):
        if culprit is COMPILER or is_right({0: plain(case, "aot_eager")}, expected, random):
            return culprit, f"the unsharded op alike: {alone.error or 'a wrong value'}"
        return COMPILER, f"the unsharded op alike: {alone.error or 'a wrong value'}"
    on_ranks = real(case, backend)
    raised = _error(on_ranks)
    culprit = INDUCTOR if culprit is INDUCTOR else DTENSOR
    if _error(found) is not None and raised is not None:
        return culprit, f"compiled on real ranks: {raised}"
    if _error(found) is None and all(same_bits(found[r], on_ranks[r]) for r in found):
        return culprit, "compiled on real ranks: the same values"
    if _error(found) is not None and not is_right(on_ranks, expected, random):
        return culprit, "compiled on real ranks: a wrong value"
    if raised is not None:
        return OURS, f"a wrong value where real ranks raise {raised}"
    if not is_right(on_ranks, expected, random):
        return OURS, "compiled on real ranks: wrong too, but other values"
    return OURS, "compiled on real ranks: right"


def _error(results: Results) -> str | None:
    return next((r.error for r in results.values() if r.error is not None), None)
