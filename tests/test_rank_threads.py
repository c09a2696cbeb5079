"""Ranks as threads: object collectives between them, and what is refused."""

import pytest
import torch.distributed as dist

from localtensor_compile import CollectiveError, LocalTensorMode
from localtensor_compile.world.rank_threads import run_in_threads


def in_threads(fn, ranks=(0, 1, 2), world=3):
    with LocalTensorMode(world):
        return run_in_threads(ranks, fn)


def test_objects_are_exchanged_and_copied():
    def program(rank):
        mine = {"rank": rank}
        gathered = [None] * 3
        dist.all_gather_object(gathered, mine)
        mine["rank"] = None
        at_root = [None] * 3
        dist.gather_object(rank * 2, at_root if rank == 1 else None, dst=1)
        told = [rank]
        dist.broadcast_object_list(told, src=2)
        part = [None]
        dist.scatter_object_list(part, list("abc") if rank == 0 else None, src=0)
        return gathered, at_root, told, part

    everybody = [{"rank": r} for r in range(3)]
    for rank, (gathered, at_root, told, part) in in_threads(program).items():
        assert gathered == everybody
        assert at_root == ([0, 2, 4] if rank == 1 else [None] * 3)
        assert told == [2]
        assert part == ["abc"[rank]]


@pytest.mark.parametrize("rounds", (0, 2))
def test_a_rank_that_is_done_while_others_wait(rounds):
    def program(rank):
        for _ in range(rounds + (rank != 1)):
            dist.all_gather_object([None] * 3, rank)

    message = (
        r"ranks \[0, 2\] wait for a collective that the other ranks do not call\. All ranks must "
        r"call the same collectives in the same order\."
    )
    for _ in range(20):  # whoever comes first
        with pytest.raises(CollectiveError, match=message):
            in_threads(program)


def test_the_error_of_a_rank_stops_the_others():
    def program(rank):
        if rank == 1:
            raise KeyError("mine")
        dist.all_gather_object([None] * 3, rank)

    with pytest.raises(KeyError, match="mine"):
        in_threads(program)


def test_a_part_of_the_ranks():
    def program(rank):
        dist.all_gather_object([None] * 2, rank, group=group)

    message = r"called for a part of the ranks\. Use the default group\."
    with LocalTensorMode(3):
        group = dist.new_group([0, 1])
        with pytest.raises(CollectiveError, match=message):
            run_in_threads((0, 1, 2), program)
