"""What lint predicts is what happens on real processes: it hangs in these lines, fails, or goes on
with wrong values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from localtensor_compile import World, schedule
from localtensor_compile.check.gloo import GlooError, shared_pool

from .lint_correct import CORRECT
from .lint_programs import CORRUPT, ERROR, FAULTY, FRAGILE, HANG

FOLDER = Path(__file__).parent

# A program that hangs costs the whole time-out: most are slow tests.
QUICK = (
    "reduces_against_broadcast",
    "swaps_two_groups",
    "reduces_for_the_log",
    "leaves_early",
    "raises_on_one_rank",
    "reduces_other_sizes",
    "reduces_integers_with_floats",
    "sums_against_maximum",
    "broadcasts_from_itself",
    "expects_other_splits",
    "sends_to_nobody",
    "both_send_first",
    "receives_into_a_small_tensor",
)


def _marked(names: Any) -> list[Any]:
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


def _on_gloo(file: str, name: str, size: int, timeout: float) -> Any:
    """What the ranks return, or the error."""
    try:
        return shared_pool().run(f"{FOLDER / file}:{name}", size, World(size), timeout=timeout)
    except GlooError as error:
        return error


@pytest.mark.parametrize("name", _marked(FAULTY))
def test_the_prediction_happens(name: str) -> None:
    faulty = FAULTY[name]
    (finding,) = schedule(faulty.program, faulty.size).findings
    for timeout in (1.5, 15.0):  # a busy machine may need the second
        found = _on_gloo("lint_programs.py", name, faulty.size, timeout)
        said = _what_happened(found, faulty, finding)
        # Ranks that make other groups race for the keys of the store.
        if said == finding.outcome or (finding.kind == "groups" and said == ERROR):
            return
    pytest.fail(f"predicted {finding.outcome}: {finding}\n\nbut it {said}")


def _what_happened(found: Any, faulty: Any, finding: Any) -> str:
    if not isinstance(found, GlooError):
        if faulty.outcome != CORRUPT:
            return FRAGILE
        wrong = [
            r for r, outputs in found.items() if not _equal(outputs, faulty.right(r, len(found)))
        ]
        return CORRUPT if wrong else "returned the right values"
    if not found.waiting:
        return ERROR if found.raised or found.exited else str(found)
    if finding.outcome != HANG:
        return ERROR if found.raised or found.exited else HANG
    predicted = {rank: f"{source.file}:{source.line} in " for rank, source in finding.waits.items()}
    for rank, where in found.waiting.items():
        if finding.kind != "groups" and not where.startswith(predicted.get(rank, "nowhere")):
            return f"waits elsewhere: {found.waiting}"
    return HANG


def _equal(outputs: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(torch.equal(outputs[k].double(), right[k].double()) for k in right)


@pytest.mark.slow
@pytest.mark.parametrize("name", CORRECT)
def test_the_correct_programs_end(name: str) -> None:
    found = _on_gloo("lint_correct.py", name, CORRECT[name][1], 60.0)
    assert not isinstance(found, GlooError), str(found)
