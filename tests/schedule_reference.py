"""What real gloo ranks do, seen by torch's profiler: the reference for schedules."""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile

from localtensor_compile import World


def collectives_on_gloo(name: str, world: World) -> list[tuple[str, int]]:
    """(what gloo does, elements of its first tensor) in order, of one rank of a program."""
    from tests.lint_correct import CORRECT

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        CORRECT[name][0](world)
    events = sorted(
        (e for e in found.events() if e.name.startswith("gloo:")), key=lambda e: e.time_range.start
    )
    return [(e.name.removeprefix("gloo:"), _elements(e.input_shapes)) for e in events]


def _elements(shapes: Any) -> int:
    total = 1
    for size in shapes[0] if shapes else ():
        total *= size
    return total
