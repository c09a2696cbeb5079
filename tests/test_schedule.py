"""`lt.schedule`: what it says ranks call is what real ranks do, and what is compiled."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline

import localtensor_compile as lt
from localtensor_compile import Call, CapturedGraphs, Schedule, ScheduleError, World, schedule
from localtensor_compile.check.gloo import shared_pool
from localtensor_compile.check.program import load_program
from localtensor_compile.errors import WorldError

from .lint_correct import CORRECT

FOLDER = Path(__file__).parent
EXAMPLES = FOLDER.parent / "docs" / "examples"

pytestmark = [
    # torch's own, of names that it replaces
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


# ---------------------------------------------------------------- against real processes
# What gloo runs for a collective of another name.
_ON_GLOO = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "all_reduce",
    "all_to_all_single": "all_to_all",
}
_QUICK = (
    "reduces_and_gathers",
    "exchanges_uneven_splits",
    "sends_objects_around",
    "leaders_talk_between_two_barriers",
    "ring_in_one_batch",
    "receives_from_any_rank",
    "pipeline_of_two_stages",
    "trains_with_fully_sharded_data",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in _QUICK else pytest.mark.slow) for n in CORRECT]
)
def test_a_schedule_is_what_real_ranks_do(name: str) -> None:
    program, size = CORRECT[name]
    reference = f"{FOLDER / 'schedule_reference.py'}:collectives_on_gloo"
    real = shared_pool().run(reference, size, name, World(size), timeout=60.0)
    found = schedule(program, size)
    for rank in range(size):
        assert list(_as_on_gloo(found, rank)) == [_seen(op, n) for op, n in real[rank]]


def _as_on_gloo(found: Schedule, rank: int) -> Iterator[tuple[str, int | None]]:
    for call in found.rank(rank):
        if call.kind == "group":
            continue
        tensors = call.given or call.taken
        count = math.prod(tensors[0].shape) if tensors else 1
        if call.op == "reduce_scatter":  # of lists: an all_reduce per part
            yield from [("all_reduce", count)] * len(tensors)
        else:
            yield _seen(_ON_GLOO.get(call.op, call.op), count)


def _seen(op: str, elements: int) -> tuple[str, int | None]:
    if op == "recvAnySource":
        return "recv", elements
    return op, None if op == "scatter" else elements  # of which the profiler sees no shape


# ---------------------------------------------------------------- against captured graphs
@pytest.mark.parametrize(
    "example",
    [
        "functional_collectives",
        pytest.param("tp_mlp", marks=pytest.mark.slow),
        pytest.param("tp_transformer", marks=pytest.mark.slow),
    ],
)
def test_captured_graphs_have_the_calls_of_a_run(example: str) -> None:
    program = load_program(str(EXAMPLES / f"{example}.py"))
    compiled = schedule(lt.capture(program, 4))
    run = schedule(program, 4)
    assert compiled.findings == []
    assert sum(len(compiled.rank(r)) for r in range(4)) > 0
    for rank in range(4):
        traced = Counter(map(_what, compiled.rank(rank)))
        assert not traced - Counter(map(_what, run.rank(rank)))


@pytest.fixture(scope="module")
def graphs() -> CapturedGraphs:
    return lt.capture(load_program(str(EXAMPLES / "functional_collectives.py")), 4)


def _what(call: Call) -> tuple[Any, ...]:
    """A call without its name for the group and its line: backward has none in eager."""
    return call.op, call.group.ranks, call.given, call.bytes, call.reduce_op, call.splits


def test_captured_graphs_as_text(graphs: CapturedGraphs) -> None:
    text = str(schedule(graphs)).replace("functional_collectives", "file")
    assert_expected_inline(
        _narrow(text),
        """\
world of 4 ranks
group column: 0-1; 2-3
group row: 0,2; 1,3

ranks  line                          group   bytes  call
-----  -----  -----  -----  -----
0-3    file.py:25  row     48     all_reduce(f32[4, 3], avg)
0-3    file.py:26  column  48     all_to_all_single(f32[4, 3], sends [2, 2], expects [2, 2])
0-3    file.py:27  column  48     all_reduce(f32[4, 3], max)
""",
    )


def _narrow(text: str) -> str:
    """With short rules."""
    return re.sub("-{5,}", "-----", text)


def test_captured_graphs_know_their_size(graphs: CapturedGraphs) -> None:
    assert schedule(graphs, 4).world_size == 4
    with pytest.raises(ScheduleError) as error:
        schedule(graphs, 8)
    start = "these graphs are of 4 ranks, not of 8. Leave out world_size, or capture the program "
    assert str(error.value) == f"{start}again."


# ---------------------------------------------------------------- what is recorded
def _program(world: World) -> dict[str, Any]:
    rank = dist.get_rank()
    mesh = world.mesh((2, 2), ("dp", "tp"))
    x = torch.full((2 + rank, 3), float(rank))
    dist.all_reduce(torch.ones(5), op=dist.ReduceOp.MAX, group=mesh.get_group("tp"))
    if rank == 0:
        dist.send(x, 3, tag=2)
    if rank == 3:
        dist.recv(torch.empty(2, 3), 0, tag=2)
        dist.barrier()
    else:
        dist.barrier()
    y = torch.empty(4, 2)
    dist.all_to_all_single(y, torch.ones(4, 2), [1] * 4, [1] * 4)
    dist.broadcast(torch.ones(2, dtype=torch.bfloat16), 1)
    return {"y": y}


def test_the_text_of_a_schedule() -> None:
    _, first = inspect.getsourcelines(_program)
    text = re.sub(
        r"test_schedule.py:(\d+)", lambda m: f"+{int(m[1]) - first}", str(schedule(_program, 4))
    )
    assert_expected_inline(
        re.sub("  +", "  ", _narrow(text)),
        """\
world of 4 ranks
group dp: 0,2; 1,3
group tp: 0-1; 2-3
group world: 0-3

ranks  line  group  bytes  call
-----  -----  -----  -----  -----
0-3  +2  dp  0  new_group([0, 2])
0-3  +2  dp  0  new_group([1, 3])
0-3  +2  tp  0  new_group([0, 1])
0-3  +2  tp  0  new_group([2, 3])
0-3  +4  tp  20  all_reduce(f32[5], max)
0  +6  world  24  send(f32[2, 3], to rank 3, tag 2)
3  +8  world  24  recv(f32[2, 3], from rank 0, tag 2)
0-3  {0-2: +11, 3: +9}  world  0  barrier()
0-3  +13  world  32  all_to_all_single(f32[4, 2], sends [1, 1, 1, 1], expects [1, 1, 1, 1])
0-3  +14  world  4  broadcast(bf16[2], root 1)
""",
    )


def test_the_calls_of_a_rank() -> None:
    found = schedule(_program, 4)
    calls = [c for c in found.rank(3) if c.kind != "group"]
    assert [c.op for c in calls] == [
        "all_reduce", "recv", "barrier", "all_to_all_single", "broadcast",
    ]  # fmt: skip
    reduced, received, _, exchanged, sent = calls
    assert (reduced.group.ranks, reduced.reduce_op, reduced.bytes) == ((2, 3), "max", 20)
    assert (received.peer, received.tag, received.bytes) == (0, 2, 24)
    assert exchanged.splits == ((1, 1, 1, 1), (1, 1, 1, 1))
    assert (sent.root, sent.bytes, sent.given[0].dtype) == (1, 4, "bf16")
    assert [c.sequence for c in calls] == [0, None, 0, 1, 2]  # per group
    assert sent.source is not None and sent.source.file == __file__
    assert sent.source.code == "dist.broadcast(torch.ones(2, dtype=torch.bfloat16), 1)"


def test_the_calls_on_a_group() -> None:
    found = schedule(_program, 4)
    assert {r: [c.op for c in calls] for r, calls in found.on("tp").items()} == {
        r: ["new_group", "new_group", "all_reduce"] for r in range(4)
    }
    assert found.groups["dp"] == frozenset({(0, 2), (1, 3)})
    with pytest.raises(ScheduleError) as error:
        found.on("pp")
    text = "no call is on a group 'pp'; the groups are dp, tp, world."
    assert str(error.value) == text
    with pytest.raises(ScheduleError, match="there is no rank 4 in a world of 4 ranks"):
        found.rank(4)


def test_a_receive_from_any_rank_knows_its_sender() -> None:
    found = schedule(CORRECT["receives_from_any_rank"][0], 3)
    assert sorted(c.peer for c in found.rank(0) if c.peer is not None) == [1, 2]
    assert all(c.any_source for c in found.rank(0))


def test_the_lines_of_a_backward_are_those_of_the_program() -> None:
    found = schedule(CORRECT["trains_with_data_parallelism"][0], 2)
    assert {c.source.file for c in found.rank(0) if c.source} == {str(FOLDER / "lint_correct.py")}


def test_json() -> None:
    found = json.loads(schedule(_program, 4).to_json())
    assert found["world_size"] == 4
    received = next(c for c in found["ranks"]["3"]["calls"] if c["op"] == "recv")
    assert received["outputs"] == ["f32[2, 3]"]
    assert (received["peer"], received["tag"], received["group"]) == (0, 2, "world")
    assert received["code"] == "dist.recv(torch.empty(2, 3), 0, tag=2)"


def test_a_program_without_calls() -> None:
    assert str(schedule(lambda world: {}, 2)) == "world of 2 ranks\n\nno calls\n"


def test_a_rank_that_raises_is_in_the_text() -> None:
    def program(world: World) -> dict[str, Any]:
        raise KeyError(dist.get_rank())

    text = str(schedule(program, 2))
    assert "\nrank 1 raised KeyError: 1 at test_schedule.py:" in text


# ---------------------------------------------------------------- arguments
@pytest.mark.parametrize("size", [None, 0, -1])
def test_a_program_needs_a_number_of_ranks(size: int | None) -> None:
    with pytest.raises(ScheduleError) as error:
        schedule(_program, size)
    expected = f"world_size={size}: say how many ranks run the program, at least one."
    assert str(error.value) == expected


def test_no_schedule_within_a_schedule() -> None:
    def program(world: World) -> dict[str, Any]:
        schedule(_program, 2)
        return {}

    (found,) = schedule(program, 2).findings
    assert found.title.startswith("ranks 0-1 raise WorldError: ranks already run in threads")
    assert issubclass(WorldError, RuntimeError)


@pytest.mark.parametrize("name", ["swaps_two_groups", "both_send_first", "leaves_early"])
@pytest.mark.parametrize("seed", range(4))
def test_the_interleaving_changes_nothing(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from localtensor_compile.runner.engine import Engine
    from localtensor_compile.schedule import run

    from .lint_programs import FAULTY

    faulty = FAULTY[name]
    before = schedule(faulty.program, faulty.size)
    monkeypatch.setattr(run, "Engine", lambda *args, **kw: Engine(*args, seed=seed, **kw))
    found = schedule(faulty.program, faulty.size)
    assert list(map(str, found.findings)) == list(map(str, before.findings))
