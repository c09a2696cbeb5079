"""Functional collectives inside a compiled function, on a 2-D mesh of data that ranks differ in.

    localtensor check docs/examples/functional_collectives.py --nproc-per-node 4
    torchrun --nproc-per-node 4 docs/examples/functional_collectives.py

`world.rank_map` gives every rank data of its own: one tensor per simulated rank, or this rank's
tensor in a real process.
"""

from __future__ import annotations

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import localtensor_compile as lt


def program(world: lt.World) -> dict[str, Tensor]:
    """Runs on an even number of ranks: the mesh has 2 rows."""
    columns = world.size // 2
    mesh = world.mesh((2, columns), ("row", "column"))

    def mix(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = funcol.all_reduce(x, "avg", (mesh, 0))
        swapped = funcol.all_to_all_single((x - mean).tanh(), None, None, (mesh, 1))
        largest = funcol.all_reduce(swapped, "max", (mesh, 1))
        return mean, swapped, largest

    x = world.rank_map(
        lambda rank: torch.arange(columns * 6.0, device=world.device).view(-1, 3).sin() * (rank + 1)
    )
    mean, swapped, largest = world.compile(mix)(x)
    return {"x": x, "mean": mean, "swapped": swapped, "largest": largest}


if __name__ == "__main__":
    lt.main(program)
