"""Groups that every rank makes for itself and keeps in this module, as large programs do."""

import torch.distributed as dist

_PAIR: dist.ProcessGroup | None = None
_CALLS = 0


def make_groups() -> None:
    global _PAIR
    rank, size = dist.get_rank(), dist.get_world_size()
    for start in range(0, size, 2):
        ranks = list(range(start, min(start + 2, size)))
        group = dist.new_group(ranks)
        if rank in ranks:
            _PAIR = group


def pair() -> dist.ProcessGroup:
    global _CALLS
    _CALLS += 1
    if _PAIR is None:
        raise RuntimeError("make_groups() first")
    return _PAIR


def calls() -> int:
    return _CALLS
