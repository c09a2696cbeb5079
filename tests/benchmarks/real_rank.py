"""One real rank of the program of checking.py, eager: a process, or a worker of the gloo pool."""

from __future__ import annotations

import torch
import torch.distributed as dist

import localtensor_compile as lt
from tests.benchmarks.checking import program


def run() -> float:
    """The loss; the default process group is there already."""
    torch.manual_seed(0)
    found = program(lt.World(dist.get_world_size()))
    return float(found["loss"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run()
    dist.destroy_process_group()
