"""`lt.capture`: run a program on simulated ranks and keep the graphs it compiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..check.engines import simulated_world
from ..check.program import Program, ProgramFunction, World, as_program
from ..collectives.groups import mesh_groups
from ..golden.fold import Family
from .graphs import CapturedGraphs, CaptureError
from .record import (
    BACKWARD,
    FORWARD,
    POST_GRAD,
    STAGES,
    Recorded,
    Recorder,
    fresh_compiler,
    graph_breaks,
)

DEFAULT = (FORWARD, BACKWARD)


def capture(
    program: Program | ProgramFunction,
    world_size: int,
    *,
    stage: str | Sequence[str] = DEFAULT,
    seed: int = 0,
    device: torch.device | str = "cpu",
    values: bool = False,
) -> CapturedGraphs:
    """The graphs of all ranks of what `program` compiles.

    Args:
        program: a function program(world), as for `check`; what it hands to `world.compile` is
            captured.
        world_size: number of ranks.
        stage: which graphs to print and compare, of "dynamo", "joint", "forward", "backward" and
            "post_grad", for which the program runs twice.
        seed: of torch.manual_seed.
        device: where the program's World says tensors go.
        values: also keep what each graph is given in its first call and what it returns then, as
            `save_bundle` needs them.

    Raises:
        CaptureError: another stage, a program that compiles nothing, or one whose graph breaks.
        ProgramError: not a program.
    """
    from torch._dynamo.exc import Unsupported

    stages = (stage,) if isinstance(stage, str) else tuple(stage)
    unknown = [s for s in stages if s not in STAGES]
    if unknown or not stages:
        raise CaptureError(
            f"stage={stage!r}: the stages of a graph are {', '.join(STAGES)}, or a list of them."
        )
    checked = as_program(program)

    def run(recorder: Recorder) -> tuple[Mapping[str, Family], Mapping[str, int]]:
        with fresh_compiler(), simulated_world(world_size, seed, torch.device(device)):
            try:
                checked.function(World(world_size, device, recorder.backend))
            except Unsupported as error:
                raise CaptureError(
                    f"{checked.name} cannot be captured whole: {str(error).strip()}\nCompile less "
                    "of it, or allow the break with world.compile(..., fullgraph=False): then each "
                    "graph is captured on its own."
                ) from error
            return mesh_groups(range(world_size)), graph_breaks()

    recorder = Recorder(values=values)
    groups, breaks = run(recorder)
    if not recorder.frames:
        raise CaptureError(
            f"{checked.name} compiled nothing: there is no graph to capture. Hand the function or "
            "module to world.compile(...) and call what it returns."
        )
    if POST_GRAD in stages:
        # Inductor decomposes ops before AOTAutograd traces: its graphs are from another run.
        lowered = Recorder(inductor=True)
        run(lowered)
        _add_lowered(checked, recorder.frames, lowered.frames)
    return CapturedGraphs(world_size, stages, recorder.frames, groups, breaks, str(device))


def _add_lowered(program: Program, frames: list[Recorded], lowered: list[Recorded]) -> None:
    if len(frames) != len(lowered):
        raise CaptureError(
            f"{program.name} compiled {len(frames)} graphs, and {len(lowered)} when it ran again "
            "with Inductor, as stage='post_grad' needs. Make it compile the same each time."
        )
    for frame, other in zip(frames, lowered):
        found = {stage: g for stage, g in other.graphs.items() if stage.startswith(POST_GRAD)}
        frame.graphs.update(found)
