"""`lt.capture`: run a program on simulated ranks and keep the graphs it compiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..check.engines import simulated_world
from ..check.program import Program, ProgramFunction, World, as_program
from ..collectives.groups import mesh_groups
from .graphs import CapturedGraphs, CaptureError
from .record import (
    BACKWARD,
    FORWARD,
    POST_GRAD,
    STAGES,
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
            "post_grad".
        seed: of torch.manual_seed.
        device: where the program's World says tensors go.
        values: also keep what each graph is given in its first call and what it returns then, as
            `save_bundle` needs them.

    Raises:
        CaptureError: another stage, values of "post_grad", a program that compiles nothing, or one
            whose graph breaks.
        ProgramError: not a program.
    """
    from torch._dynamo.exc import Unsupported

    stages = (stage,) if isinstance(stage, str) else tuple(stage)
    unknown = [s for s in stages if s not in STAGES]
    if unknown or not stages:
        raise CaptureError(
            f"stage={stage!r}: the stages of a graph are {', '.join(STAGES)}, or a list of them."
        )
    if values and POST_GRAD in stages:
        raise CaptureError(
            "values=True keeps what AOTAutograd's graphs compute, but stage='post_grad' runs what "
            "Inductor makes of them. Capture twice."
        )
    checked = as_program(program)
    recorder = Recorder(inductor=POST_GRAD in stages, values=values)
    with fresh_compiler(), simulated_world(world_size, seed, torch.device(device)):
        try:
            checked.function(World(world_size, device, recorder.backend))
        except Unsupported as error:
            raise CaptureError(
                f"{checked.name} cannot be captured whole: {str(error).strip()}\nCompile less of "
                "it, or allow the break with world.compile(..., fullgraph=False): then each graph "
                "is captured on its own."
            ) from error
        groups = mesh_groups(range(world_size))
        breaks = graph_breaks()
    if not recorder.frames:
        raise CaptureError(
            f"{checked.name} compiled nothing: there is no graph to capture. Hand the function or "
            "module to world.compile(...) and call what it returns."
        )
    return CapturedGraphs(world_size, stages, recorder.frames, groups, breaks, str(device))
