"""`localtensor lint`: faulty programs are found with the right lines, correct ones are not."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline

import localtensor_compile as lt
from localtensor_compile import World, schedule
from localtensor_compile.cli import main
from localtensor_compile.golden.listing import TensorType
from localtensor_compile.runner.engine import current_engine
from localtensor_compile.schedule.calls import COLLECTIVE, Call, Group, RankRecord
from localtensor_compile.schedule.findings import Finding
from localtensor_compile.schedule.linting import findings

from . import lint_programs
from .lint_correct import CORRECT
from .lint_programs import FAULTY

FILE = str(Path(lint_programs.__file__))

pytestmark = [
    # torch's own, of names that it replaces
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


def _marked(program: Callable[..., Any]) -> set[int]:
    """The lines that end in `# !`, and those of helpers that it calls."""
    lines, start = inspect.getsourcelines(program)
    found = {start + i for i, line in enumerate(lines) if line.rstrip().endswith("# !")}
    if any(" _log(" in line for line in lines):
        helper, first = inspect.getsourcelines(lint_programs._log)
        found |= {first + i for i, line in enumerate(helper) if line.rstrip().endswith("# !helper")}
    return found


def _only(finding_of: str) -> Finding:
    faulty = FAULTY[finding_of]
    (finding,) = schedule(faulty.program, faulty.size).findings
    return finding


@pytest.mark.parametrize("name", FAULTY)
def test_the_mistake_is_found_with_its_lines(name: str) -> None:
    faulty = FAULTY[name]
    found = schedule(faulty.program, faulty.size).findings
    assert [f.kind for f in found] == list(faulty.kinds), "\n\n".join(map(str, found))
    assert {f.outcome for f in found} == {faulty.outcome}
    assert {line.line for f in found for line in f.lines} == _marked(faulty.program)
    assert {line.file for f in found for line in f.lines} == {FILE}


@pytest.mark.parametrize("name", CORRECT)
def test_nothing_is_found_in_a_correct_program(name: str) -> None:
    program, size = CORRECT[name]
    found = schedule(program, size)
    assert found.findings == [], str(found)
    assert {r.end for r in found.records.values()} == {"returned"}, str(found)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_mistake_that_depends_on_random_numbers(seed: int) -> None:
    def program(world: World) -> dict[str, Any]:
        torch.manual_seed(world.size + dist.get_rank())
        if torch.rand(1) < 0.5:
            dist.barrier()
        return {}

    torch.manual_seed(seed)
    before = torch.get_rng_state()
    found = [schedule(program, 4, seed=seed).findings for _ in range(2)]
    assert [str(f) for f in found[0]] == [str(f) for f in found[1]]
    assert torch.equal(before, torch.get_rng_state())


def test_a_world_can_be_linted_again_after_a_hang() -> None:
    for _ in range(3):
        assert len(schedule(FAULTY["both_send_first"].program, 2).findings) == 1
    assert not dist.is_initialized()


# ---------------------------------------------------------------- texts
def test_the_text_of_different_collectives() -> None:
    assert_expected_inline(
        _text("reduces_against_broadcast"),
        """\
different collectives (hang): collective 1 on world is all_reduce on rank 0, broadcast on rank 1
    rank 0  lint_programs.py:+4: dist.all_reduce(x)  # !
            all_reduce(f32[4], sum)
    rank 1  lint_programs.py:+6: dist.broadcast(x, 0)  # !
            broadcast(f32[4], root 0)
    On a cluster: each waits for the others to call the same, for ever; lint_programs.py:+4 is
        reached only where `if dist.get_rank() == 0` (line +3) is true.
    Change: let all ranks of a group call the same collectives in the same order.""",
    )


def test_the_text_of_some_ranks() -> None:
    assert_expected_inline(
        _text("reduces_for_the_log"),
        """\
only some ranks (hang): all_reduce of rank 0 is not called by rank 1
    rank 0  lint_programs.py:+4: dist.all_reduce(loss)  # !
            all_reduce(f32[1], sum)
    rank 0  lint_programs.py:+5: dist.all_reduce(grad)  # !
            all_reduce(f32[1], sum)
    rank 1  lint_programs.py:+6: return {"grad": grad}  # !
            returns
    On a cluster: rank 0 calls collectives on world 2 times, rank 1 once: rank 0 waits for ever;
        lint_programs.py:+4 is reached only where `if dist.get_rank() == 0` (line +3) is true.
    Change: call it on all ranks of the group, or on none: take it out of the branch or the loop,
        or decide the branch by a value that all ranks share.""",
    )


def test_the_text_of_a_forgotten_collective() -> None:
    assert_expected_inline(
        _text("starts_a_collective_and_forgets_it"),
        """\
only some ranks (corrupt): all_reduce of rank 0 is not called by rank 1
    rank 0  lint_programs.py:+4: dist.all_reduce(x, async_op=True)  # !
            all_reduce(f32[4], sum)
    rank 1  lint_programs.py:+5: return {"x": x}  # !
            returns
    On a cluster: rank 0 calls collectives on world once, rank 1 never: rank 0 goes on with what
        it had; lint_programs.py:+4 is reached only where `if dist.get_rank() == 0` (line +3) is
        true.
    Change: call it on all ranks of the group, or on none: take it out of the branch or the loop,
        or decide the branch by a value that all ranks share.""",
    )


def test_the_text_of_a_group_that_some_ranks_make() -> None:
    assert_expected_inline(
        _text("only_members_make_the_group"),
        """\
only some ranks (fragile): new_group of ranks 0-1 is not called by rank 2
    ranks 0-1  lint_programs.py:+4: pair = dist.new_group([0, 1])  # !
               new_group([0, 1])
    rank 2     lint_programs.py:+6: return {"x": x}  # !
               returns
    On a cluster: this goes on: only the members wait for each other. But torch numbers groups, so
        that the next group of all these ranks has two names and hangs.
    Change: call new_group on every rank, also for groups that the rank is not in, or pass
        use_local_synchronization=True.""",
    )


def test_the_text_of_a_failing_rank() -> None:
    assert_expected_inline(
        _text("raises_on_one_rank"),
        """\
a rank fails (hang): rank 2 raises ValueError: no data on this rank
    rank 2     lint_programs.py:+4: raise ValueError("no data on this rank")  # !
               raises ValueError: no data on this rank
    ranks 0-1  lint_programs.py:+5: dist.all_reduce(x)  # !
               all_reduce(f32[4], sum)
    On a cluster: those that wait for it hang until a time-out, or until the launcher ends them.
    Change: let the rank not raise, or let all ranks learn of it: all_reduce a flag before the
        next collective.""",
    )


def test_the_text_of_shapes() -> None:
    assert_expected_inline(
        _text("reduces_other_sizes"),
        """\
shapes (error): all_reduce on world is given f32[1000] on rank 0, f32[500] on rank 1
    rank 0  lint_programs.py:+3: dist.all_reduce(x)  # !
            all_reduce(f32[1000], sum)
    rank 1  lint_programs.py:+3: dist.all_reduce(x)  # !
            all_reduce(f32[500], sum)
    On a cluster: a rank gets more bytes than it has room for: gloo ends its process and the
        others lose the connection; NCCL hangs or writes beyond the tensor.
    Change: give tensors of the same shape on all ranks: pad them, or exchange sizes first.""",
    )


def test_the_text_of_dtypes() -> None:
    assert_expected_inline(
        _text("reduces_integers_with_floats"),
        """\
dtypes (corrupt): all_reduce on world is given f32[4] on rank 0, i32[4] on rank 1
    rank 0  lint_programs.py:+3: dist.all_reduce(x)  # !
            all_reduce(f32[4], sum)
    rank 1  lint_programs.py:+3: dist.all_reduce(x)  # !
            all_reduce(i32[4], sum)
    On a cluster: nobody compares: bytes are combined in the order of memory, values are wrong.
    Change: give tensors of the same dtype on all ranks, as with .to(dtype).""",
    )


def test_the_text_of_reduce_ops() -> None:
    assert_expected_inline(
        _text("sums_against_maximum"),
        """\
reduce ops (corrupt): all_reduce on world computes sum on rank 0, max on rank 1
    rank 0  lint_programs.py:+4: dist.all_reduce(x, op=dist.ReduceOp.SUM)  # !
            all_reduce(f32[4], sum)
    rank 1  lint_programs.py:+6: dist.all_reduce(x, op=dist.ReduceOp.MAX)  # !
            all_reduce(f32[4], max)
    On a cluster: each rank reduces its part of the tensor by its own op: the result is a mixture.
    Change: give op the same value on all ranks.""",
    )


def test_the_text_of_roots() -> None:
    assert_expected_inline(
        _text("broadcasts_from_itself"),
        """\
roots (hang): broadcast on world has root 0 on rank 0, 1 on rank 1
    rank 0  lint_programs.py:+3: dist.broadcast(x, src=dist.get_rank())  # !
            broadcast(f32[4], root 0)
    rank 1  lint_programs.py:+3: dist.broadcast(x, src=dist.get_rank())  # !
            broadcast(f32[4], root 1)
    On a cluster: each rank waits for the one that it takes for the root, or for those that it
        thinks it is the root of.
    Change: give src or dst the same global rank everywhere (group_src and group_dst are ranks of
        the group).""",
    )


def test_the_text_of_splits() -> None:
    assert_expected_inline(
        _text("expects_other_splits"),
        """\
splits (error): all_to_all_single on world sends 12000 bytes of f32 from rank 0 to rank 1, which
    expects 8000 bytes of f32
    rank 0  lint_programs.py:+6: dist.all_to_all_single(y, torch..(4, 1000), expected, sent)  # !
            all_to_all_single(f32[4, 1000], sends [1, 3], expects [1, 2])
    rank 1  lint_programs.py:+6: dist.all_to_all_single(y, torch..(4, 1000), expected, sent)  # !
            all_to_all_single(f32[4, 1000], sends [2, 2], expects [2, 2])
    On a cluster: a rank gets more bytes than it has room for: gloo ends its process and the
        others lose the connection; NCCL hangs or writes beyond the tensor.
    Change: let what a rank sends to another be what that one expects: exchange the splits first,
        with an all_to_all_single of the counts.""",
    )


def test_the_text_of_a_gather() -> None:
    assert_expected_inline(
        _text("gathers_into_a_short_list"),
        """\
shapes (error): gather on world has f32[1000] for rank 2 on root 0, and f32[2000] there
    ranks 0-1  lint_programs.py:+4: dist.gather(_ones(2000 if rank..lse 1000), found, dst=0)  # !
               gather(f32[1000], root 0)
    rank 2     lint_programs.py:+4: dist.gather(_ones(2000 if rank..lse 1000), found, dst=0)  # !
               gather(f32[2000], root 0)
    On a cluster: a rank gets more bytes than it has room for: gloo ends its process and the
        others lose the connection; NCCL hangs or writes beyond the tensor.
    Change: give tensors of the same shape on all ranks: pad them, or exchange sizes first.""",
    )


def test_the_text_of_a_send() -> None:
    assert_expected_inline(
        _text("sends_to_nobody"),
        """\
send without recv (hang): rank 0 sends to rank 1, which does not receive it
    rank 0  lint_programs.py:+4: dist.send(x, 1)  # !
            send(f32[4], to rank 1)
    rank 1  lint_programs.py:+5: return {"x": x}  # !
            returns
    On a cluster: the send waits for the receiver for ever (with NCCL small ones return, and what
        is received next is wrong).
    Change: let the receiver call recv once per send, with the same group and tag.""",
    )


def test_the_text_of_a_forgotten_send() -> None:
    assert_expected_inline(
        _text("starts_a_send_and_forgets_it"),
        """\
send without recv (fragile): rank 0 sends to rank 1, which does not receive it
    rank 0  lint_programs.py:+4: dist.isend(x, 1)  # !
            send(f32[4], to rank 1)
    rank 1  lint_programs.py:+5: return {"x": torch.ones(1)}  # !
            returns
    On a cluster: nobody gets the data; the send may still run when its tensor is changed.
    Change: let the receiver call recv once per send, with the same group and tag.""",
    )


def test_the_text_of_a_receive() -> None:
    assert_expected_inline(
        _text("receives_from_any_once_too_often"),
        """\
recv without send (hang): rank 0 receives from any rank, which does not send
    rank 0  lint_programs.py:+5: dist.recv(x)  # !
            recv(f32[4], from any rank)
    rank 1  lint_programs.py:+8: return {"x": x}  # !
            returns
    On a cluster: the receive waits for ever.
    Change: let the sender call send once per receive, with the same group and tag.""",
    )


def test_the_text_of_tags() -> None:
    assert_expected_inline(
        _text("uses_other_tags"),
        """\
tags (hang): rank 0 uses tag 7, rank 1 tag 8
    rank 0  lint_programs.py:+4: dist.send(x, 1, tag=7)  # !
            send(f32[4], to rank 1, tag 7)
    rank 1  lint_programs.py:+6: dist.recv(x, 0, tag=8)  # !
            recv(f32[4], from rank 0, tag 8)
    On a cluster: on gloo a message meets a receive of its own tag only: both wait for ever (NCCL
        ignores tags).
    Change: give both sides the same tag.""",
    )


def test_the_text_of_a_message_that_does_not_fit() -> None:
    assert_expected_inline(
        _text("receives_into_a_small_tensor"),
        """\
shapes (error): rank 0 sends f32[1000], and rank 1 expects f32[10]
    rank 0  lint_programs.py:+4: dist.send(x, 1)  # !
            send(f32[1000], to rank 1)
    rank 1  lint_programs.py:+7: dist.recv(x, 0)  # !
            recv(f32[10], from rank 0)
    On a cluster: a rank gets more bytes than it has room for: gloo ends its process and the
        others lose the connection; NCCL hangs or writes beyond the tensor.
    Change: give tensors of the same shape on all ranks: pad them, or exchange sizes first.""",
    )


def test_the_text_of_a_cycle_of_messages() -> None:
    assert_expected_inline(
        _text("both_send_first"),
        """\
deadlock (hang): ranks wait for each other: 0 -> 1 -> 0
    rank 0  lint_programs.py:+3: dist.send(x, other)  # !
            send(f32[4], to rank 1)
    rank 1  lint_programs.py:+3: dist.send(x, other)  # !
            send(f32[4], to rank 0)
    On a cluster: each waits for a call that the next one would make later: none goes on. Small
        messages may pass with other backends.
    Change: let one side call the other way round (receive first on odd ranks), or start sends and
        receives together with batch_isend_irecv.""",
    )


def test_the_text_of_a_cycle_of_groups() -> None:
    assert_expected_inline(
        _text("waits_around_three_groups"),
        """\
deadlock (hang): ranks wait for each other: 0 -> 1 -> 2 -> 0
    rank 0  lint_programs.py:+6: dist.all_reduce(x, group=left)  # !
            all_reduce(f32[4], sum) on group1
    rank 1  lint_programs.py:+9: dist.all_reduce(x, group=right)  # !
            all_reduce(f32[4], sum) on group2
    rank 2  lint_programs.py:+12: dist.all_reduce(x, group=outer)  # !
            all_reduce(f32[4], sum) on group3
    On a cluster: each waits for a call that the next one would make later: none goes on.
    Change: call the collectives of different groups in the same order on all ranks.""",
    )


def test_the_text_of_groups() -> None:
    assert_expected_inline(
        _text("ranks_name_other_members"),
        """\
groups (hang): the new group number 1 has ranks [0, 1] on rank 0, [0, 1, 2] on ranks 1-2
    rank 0     lint_programs.py:+3: group = dist.new_group([0, 1] ..ank == 0 else [0, 1, 2])  # !
               new_group([0, 1])
    ranks 1-2  lint_programs.py:+3: group = dist.new_group([0, 1] ..ank == 0 else [0, 1, 2])  # !
               new_group([0, 1, 2])
    On a cluster: torch numbers groups by the order in which a rank makes them: these have one
        name and different ranks. Making them, or their first collective, waits for ever or fails.
    Change: call new_group on every rank, for all groups, in the same order with the same ranks,
        also for groups that the rank is not in.""",
    )


def _text(name: str) -> str:
    """The finding, with lines counted from that of the function."""
    _, first = inspect.getsourcelines(FAULTY[name].program)
    text = str(_only(name))
    assert max(map(len, text.splitlines())) < 100
    for line in range(first, first + 30):
        for before in (f"lint_programs.py:{line}", f"line {line}"):
            text = text.replace(before, before.replace(str(line), f"+{line - first}"))
    return text


def _in_else(world: World) -> dict[str, Any]:
    if dist.get_rank() == 0:
        x = torch.zeros(1)
    else:
        x = torch.ones(1)
        dist.barrier()
    return {"x": x}


def _in_while(world: World) -> dict[str, Any]:
    left = dist.get_rank()
    while left > 0:
        dist.barrier()
        left -= 1
    return {}


def _in_for(world: World) -> dict[str, Any]:
    for _ in range(dist.get_rank()):
        dist.barrier()
    return {}


def _in_handler(world: World) -> dict[str, Any]:
    try:
        return {"x": 1 // dist.get_rank()}
    except (ZeroDivisionError, IndexError):
        dist.barrier()
    return {}


def _in_expression(world: World) -> dict[str, Any]:
    return {"x": dist.barrier() if dist.get_rank() else None}


def _in_inner_condition(world: World) -> dict[str, Any]:
    if dist.get_rank() == 0:
        if world.size > 1:
            dist.barrier()
    return {}


@pytest.mark.parametrize(
    "program, reason",
    [
        (_in_else, "`if dist.get_rank() == 0` (line N) is false"),
        (_in_while, "`while left > 0` (line N) is true"),
        (_in_for, "`for _ in range(dist.get_rank())` (line N) goes on"),
        (_in_handler, "(ZeroDivisionError, IndexError) was raised (line N)"),
        (_in_expression, "`dist.barrier() if dist.get_rank() else None` gets so far"),
        (_in_inner_condition, "`if dist.get_rank() == 0` (line N) is true"),
    ],
)
def test_the_branch_is_named(program: Callable[[World], dict[str, Any]], reason: str) -> None:
    (found,) = schedule(program, 2).findings
    said = re.sub(r"\(line \d+\)", "(line N)", found.happens)
    assert said.partition("is reached only where ")[2] == f"{reason}."


def test_a_loop_that_goes_on_for_longer_is_named() -> None:
    found = _only("trains_on_uneven_data")
    (line,) = {place.source.line for place in found.places if "broadcast" in place.text}
    assert found.happens.endswith(
        f"lint_programs.py:{line} is in `for _ in range(2 - dist.get_rank())` (line {line - 1}), "
        "which goes on for longer there."
    )


def test_sizes_that_are_not_known_are_not_compared() -> None:
    group = Group("ranks:0,1", (0, 1), "world")

    def record(rank: int, rows: int | str) -> RankRecord:
        given = (TensorType("f32", (rows, 2)),)
        return RankRecord((Call(rank, 0, COLLECTIVE, "all_reduce", group, 0, given),))

    assert findings({0: record(0, "s0"), 1: record(1, 4)}) == []
    assert [f.kind for f in findings({0: record(0, 3), 1: record(1, 4)})] == ["shapes"]


def test_all_ranks_that_fail_alike_are_one_finding() -> None:
    def program(world: World) -> dict[str, Any]:
        raise ValueError("no such file")

    (found,) = schedule(program, 3).findings
    assert (found.kind, found.outcome, found.ranks) == ("a rank fails", "error", (0, 1, 2))
    assert found.title == "ranks 0-2 raise ValueError: no such file"


def test_a_wait_for_a_store_is_a_deadlock() -> None:
    def program(world: World) -> dict[str, Any]:
        if dist.get_rank() == 1:
            engine = current_engine()
            assert engine is not None
            engine.store.wait(["never set"])
        return {}

    (found,) = schedule(program, 2).findings
    assert (found.kind, found.outcome, found.ranks) == ("deadlock", "hang", (1,))
    assert found.title == "rank 1 cannot go on"
    assert found.places[0].text.endswith("for a rank that sets the keys ['never set']")


def test_what_follows_from_a_finding_is_left_out() -> None:
    def program(world: World) -> dict[str, Any]:
        rank, x = dist.get_rank(), torch.ones(2)
        if rank == 0:
            dist.recv(x, 1)  # nobody sends
        if rank == 2:
            dist.recv(x, 0)  # rank 0 never comes here
        dist.all_reduce(x)
        if rank == 0:
            dist.send(x, 2)
        return {}

    found = schedule(program, 3).findings
    # Rank 1 waits in the all_reduce, for rank 0, that waits for it: everything is one cycle.
    assert [(f.kind, f.ranks) for f in found] == [("deadlock", (0, 1))]


def test_two_mistakes_are_two_findings() -> None:
    def program(world: World) -> dict[str, Any]:
        rank, x = dist.get_rank(), torch.ones(2)
        left, right = dist.new_group([0, 1]), dist.new_group([2, 3])
        if rank == 0:
            dist.all_reduce(x, group=left)
        if rank in (2, 3):
            dist.broadcast(x, rank, group=right)
        return {}

    found = schedule(program, 4).findings
    assert [(f.kind, f.ranks) for f in found] == [("roots", (2, 3)), ("only some ranks", (0, 1))]


# ---------------------------------------------------------------- the command
def test_a_finding_is_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "lint.json"
    command = ["lint", f"{FILE}:both_send_first", "--nproc-per-node", "2", "--json", str(report)]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("deadlock (hang): ranks wait for each other: 0 -> 1 -> 0\n")
    assert out.endswith(f"FAIL  {FILE}:both_send_first: 2 calls of 2 ranks, 1 finding\n")
    found = json.loads(report.read_text())
    assert found["ok"] is False
    (finding,) = found["findings"]
    assert finding["kind"] == "deadlock"
    assert finding["ranks"] == [0, 1]
    assert finding["places"][0]["file"] == FILE
    assert finding["places"][0]["code"] == "dist.send(x, other)  # !"
    assert finding["waits"]["1"]["line"] == finding["places"][0]["line"]


def test_no_finding_is_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    file = FILE.replace("lint_programs", "lint_correct")
    command = ["lint", f"{file}:ring_of_even_and_odd", "--nproc_per_node", "4", "--schedule"]
    assert main(command) == 0
    out, _ = capsys.readouterr()
    assert "send(f32[4], to rank {0: 1, 1: 2, 2: 3, 3: 0})" in out
    assert out.endswith(f"PASS  {file}:ring_of_even_and_odd: 8 calls of 4 ranks\n")


def test_json_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", f"{FILE}:sends_to_nobody", "--nproc-per-node", "2", "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["world_size"] == 2


SCRIPT = """
import os
import sys
import torch
import torch.distributed as dist

print("started")
dist.init_process_group("gloo")
rank = int(os.environ["RANK"])
x = torch.ones(2)
dist.all_reduce(x)
if rank == 0:
    assert x.sum() == 2 * int(os.environ["WORLD_SIZE"])
    if sys.argv[1:] == ["--log"]:
        dist.all_reduce(x)
    if sys.argv[1:] == ["--exit"]:
        sys.exit(3)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    file = tmp_path / "train.py"
    file.write_text(SCRIPT)
    return str(file)


def test_a_script_for_torchrun(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", script, "--nproc-per-node", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == f"PASS  {script}: 6 calls of 3 ranks\n"
    assert err == "started\n" * 3


def test_a_script_with_a_mistake(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", script, "--nproc-per-node", "2", "--args", "--log"]) == 1
    assert_expected_inline(
        capsys.readouterr().out.replace(script, "train.py"),
        """\
different collectives (hang): collective 2 on world is all_reduce on rank 0, barrier on rank 1
    rank 0  train.py:15: dist.all_reduce(x)
            all_reduce(f32[2], sum)
    rank 1  train.py:18: dist.barrier()
            barrier()
    On a cluster: each waits for the others to call the same, for ever; train.py:15 is reached
        only where `if rank == 0` (line 12) is true.
    Change: let all ranks of a group call the same collectives in the same order.

FAIL  train.py: 4 calls of 2 ranks, 1 finding
""",
    )


def test_a_script_that_exits(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", script, "--nproc-per-node", "2", "--args", "--exit"]) == 1
    assert_expected_inline(
        capsys.readouterr().out.replace(script, "train.py"),
        """\
a rank fails (hang): rank 0 raises SystemExit: 3
    rank 0  train.py:17: sys.exit(3)
            raises SystemExit: 3
    rank 1  train.py:18: dist.barrier()
            barrier()
    On a cluster: those that wait for it hang until a time-out, or until the launcher ends them.
    Change: let the rank not raise, or let all ranks learn of it: all_reduce a flag before the
        next collective.

FAIL  train.py: 3 calls of 2 ranks, 1 finding
""",
    )


def test_a_script_in_python(script: str) -> None:
    found = schedule(script, 2)
    assert [c.op for c in found.rank(1)] == ["all_reduce", "barrier"]
    assert found.findings == []
    with pytest.raises(lt.ProgramError, match=r"no such file: no_such_file\.py "):
        schedule("no_such_file.py", 2)


def test_no_program_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "no_such_file.py"]) == 2
    assert capsys.readouterr().err.startswith("localtensor lint: no such file: no_such_file.py")


def test_a_time_out_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "polls.py"
    file.write_text("def program(world):\n    while True:\n        pass\n")
    assert main(["lint", str(file), "--nproc-per-node", "2", "--timeout", "0.2"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("localtensor lint: rank 0 has run for ")


@pytest.mark.parametrize(
    "example",
    ["tp_mlp", pytest.param("tp_transformer", marks=pytest.mark.slow)],
)
def test_the_examples_pass(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[1] / "docs" / "examples" / f"{example}.py"
    assert main(["lint", str(file), "--nproc-per-node", "4"]) == 0, capsys.readouterr().out
    assert lt.schedule is schedule
