"""Bundles: what they hold, that real ranks compute the same, and what is refused."""

import functools
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.fx as fx

import localtensor_compile as lt
from localtensor_compile.bundle import manifest
from localtensor_compile.check.gloo import shared_pool
from localtensor_compile.cli import main
from localtensor_compile.replay import __main__ as under_torchrun
from localtensor_compile.replay.lockstep import run_in_lockstep
from tests import graph_programs as programs
from tests.parallel import replayed
from tests.test_zoo import ZOO

QUICK = ("tp_mlp_uneven", "embedding_with_empty_shards", "dp_and_tp", "moe_all_to_all")
# Meshes of two dimensions, of which one has two ranks.
EVEN_WORLDS = ("fsdp_over_tp", "dp_and_tp")


def zoo():
    for name, (program, own, arguments) in ZOO.items():
        for world in (2, 3, 4):
            if name in EVEN_WORLDS and world == 3:
                continue
            quick = name in QUICK and world == own
            marks = () if quick else (pytest.mark.slow,)
            bound = functools.partial(program, **arguments)
            yield pytest.param(bound, world, id=f"{name}-{world}", marks=marks)


def dropout(world):
    """Draws, a buffer that is written to, and a constant."""
    norm = torch.nn.BatchNorm1d(6)

    def forward(x):
        y = torch.nn.functional.dropout(norm(x), 0.5) + torch.tensor([1.0, 2.0] * 3)
        return funcol.all_reduce(y, "sum", dist.group.WORLD)

    out = world.compile(forward)(torch.randn(3, 6, requires_grad=True))
    out.sum().backward()
    return {"out": out}


def save(program, world, directory):
    return lt.save_bundle(lt.capture(program, world, values=True), directory)


@pytest.fixture
def bundle(tmp_path):
    return save(programs.mlp, 2, tmp_path / "bundle")


# ---------------------------------------------------------------- replay
def same_everywhere(program, world, directory):
    save(program, world, directory)
    here = [o for r in lt.replay(lt.load_bundle(directory)) for o in r.outcomes]
    real = shared_pool().run(replayed.replay, world, str(directory))
    there = [o for rank in range(world) for o in real[rank]]
    assert {(o.title, o.rank): o for o in here} == {(o.title, o.rank): o for o in there}
    assert all(o.values > 0 and not o.different for o in here), here


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize(("program", "world"), list(zoo()))
def test_zoo(program, world, tmp_path):
    same_everywhere(program, world, tmp_path / "bundle")


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_draws_and_buffers(tmp_path):
    same_everywhere(dropout, 3, tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("world", [2])
def test_under_torchrun(world, tmp_path):
    save(programs.mlp, world, tmp_path / "bundle")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "-m"]
    command += ["localtensor_compile.replay", str(tmp_path / "bundle")]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "run by 2 processes, gloo" in done.stdout
    assert done.stdout.endswith("PASS: 6 values as captured, bit for bit\n")


# ---------------------------------------------------------------- what is in it
def test_equal_ranks_share_a_program(tmp_path):
    program, world, arguments = ZOO["dp_and_tp"]
    directory = save(functools.partial(program, **arguments), world, tmp_path / "bundle")
    assert len(list((directory / "programs").iterdir())) == 2  # forward and backward
    forward = lt.load_bundle(directory).manifest.graphs[0]
    assert [part.ranks for part in forward.parts] == [(0, 1, 2, 3)]
    groups = forward.parts[0].groups
    assert groups[0] == {"group0": (0, 1)}
    assert groups[3] == {"group0": (2, 3)}


def test_ranks_that_differ_have_their_own(tmp_path):
    directory = save(programs.uneven, 3, tmp_path / "bundle")
    (forward,) = lt.load_bundle(directory).manifest.graphs
    assert [part.ranks for part in forward.parts] == [(0, 1), (2,)]


def test_names_are_the_users(bundle):
    graph = lt.load_bundle(bundle).program("forward", 1).graph
    assert [n.name for n in graph.nodes][:4] == ["up", "x", "down", "mm"]
    assert "group0" in str(graph)


def test_program_runs_alone(bundle):
    """Without a world, as whoever gets one file would use it."""
    module = lt.load_bundle(bundle).program("backward", 0).module()
    values = lt.load_bundle(bundle).values(0)
    assert isinstance(module, torch.nn.Module)
    assert set(values) == {"forward", "backward"}


# ---------------------------------------------------------------- command line
PROGRAM = """
import torch

def program(world):
    x = world.rank_map(lambda rank: torch.ones(2) * rank)
    return {"y": world.compile(lambda x: x + 1)(x)}

def step(x):
    torch._dynamo.graph_break()
    return x + 1

def breaks(world):
    return {"y": world.compile(step, fullgraph=False)(torch.ones(2))}

def stops(world):
    return {"y": world.compile(step)(torch.ones(2))}
"""


def test_command_line(tmp_path, capsys):
    (tmp_path / "program.py").write_text(PROGRAM)
    directory = str(tmp_path / "bundle")
    arguments = ["graph", str(tmp_path / "program.py"), "--nproc-per-node", "3"]
    assert main([*arguments, "--save-bundle", directory]) == 0
    assert capsys.readouterr().out == f"wrote {directory}\n"
    assert main(["replay", directory]) == 0
    out = re.sub(r"[0-9a-f]{12}", "0" * 12, capsys.readouterr().out).replace(directory, "bundle")
    version = torch.__version__.partition("+")[0]
    assert out == (
        f"bundle: 3 ranks, captured with torch {version}; run by one process, in lock-step\n"
        "\n"
        "graph    program                   ranks  values  result\n"
        "-------  ------------------------  -----  ------  ---------\n"
        "forward  forward-000000000000.pt2  0-2    3       bit-equal\n"
        "\n"
        "PASS: 3 values as captured, bit for bit\n"
    )


def test_difference_is_found(bundle, capsys):
    path = bundle / "values" / "rank1.pt"
    values = torch.load(path)
    values["forward"]["returned"][0][0, 0] += 1
    torch.save(values, path)
    accept_files(bundle)
    assert main(["replay", str(bundle)]) == 1
    out = capsys.readouterr().out
    assert "different on ranks 1" in out
    assert re.search(r"forward, rank 1: result 0: \d of 18 values differ, by up to ", out)
    assert out.endswith("FAIL: 1 of 6 values differ from the capture\n")


def accept_files(bundle):
    """Let the manifest say what is there."""
    content = json.loads((bundle / manifest.FILE).read_text())
    content["files"] = {f: manifest.sha256(bundle / f) for f in content["files"]}
    (bundle / manifest.FILE).write_text(json.dumps(content))


def edited(bundle, **changes):
    content = {**json.loads((bundle / manifest.FILE).read_text()), **changes}
    (bundle / manifest.FILE).write_text(json.dumps(content))


# ---------------------------------------------------------------- what is refused
def refused(directory, text):
    with pytest.raises(lt.BundleError, match=f"^{re.escape(text)}$"):
        lt.load_bundle(directory)


def test_no_bundle(tmp_path, capsys):
    text = (
        f"{tmp_path} is no bundle: it has no manifest.json. Write one with save_bundle, or with "
        "`localtensor graph FILE --save-bundle DIR`."
    )
    refused(tmp_path, text)
    assert main(["replay", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"localtensor replay: {text}\n"


def test_missing_file(bundle):
    (bundle / "values" / "rank1.pt").unlink()
    refused(
        bundle,
        f"{bundle} is not complete: values/rank1.pt missing. Copy or save the bundle again.",
    )


def test_altered_file(bundle):
    (file,) = bundle.glob("programs/forward-*")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    refused(
        bundle,
        f"{bundle} was altered: programs/{file.name} is not what was saved. Copy or save the "
        "bundle again.",
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<<<<<<< HEAD\n", "JSONDecodeError"),
        ("[]", "TypeError|AttributeError"),
        ('{"world_size": 2}', "KeyError"),
        ('{"format": 1}', "KeyError"),
    ],
)
def test_manifest_that_cannot_be_read(bundle, text, why):
    (bundle / manifest.FILE).write_text(text)
    with pytest.raises(lt.BundleError, match=f"manifest.json cannot be read: ({why})"):
        lt.load_bundle(bundle)


def test_manifest_without_a_rank(bundle):
    edited(bundle, world_size=3)
    with pytest.raises(
        lt.BundleError, match="not every one of the 3 ranks has its programs and values"
    ):
        lt.load_bundle(bundle)


def test_manifest_with_other_files(bundle):
    edited(bundle, files={})
    with pytest.raises(lt.BundleError, match="the list of files is not that of the programs"):
        lt.load_bundle(bundle)


def test_other_format(bundle):
    edited(bundle, format=7)
    refused(
        bundle,
        f"{bundle / manifest.FILE} has format 7, but this version of localtensor_compile reads "
        "format 1. Save the bundle again.",
    )


def test_other_torch(bundle):
    edited(bundle, torch="2.0.1")
    here = torch.__version__.partition("+")[0]
    refused(
        bundle,
        f"{bundle} was saved with torch 2.0.1, but this is torch {here}, whose kernels may compute "
        "other bits. Save the bundle again, or read it with any_torch=True (`--any-torch`).",
    )
    assert lt.load_bundle(bundle, any_torch=True).manifest.torch == "2.0.1"
    assert main(["replay", str(bundle), "--any-torch"]) == 0


def test_other_world_size(bundle, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert under_torchrun.main([str(bundle)]) == 2
    assert capsys.readouterr().err == (
        f"localtensor_compile.replay: {bundle} holds the programs of 2 ranks, but there are 3 "
        "processes. Start as many as ranks: torchrun --nproc-per-node 2.\n"
    )


def test_without_torchrun(bundle, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert under_torchrun.main([str(bundle)]) == 2
    assert "this is one real rank of several; start it with torchrun" in capsys.readouterr().err


def not_saved(graphs, directory, text):
    before = sorted(os.listdir(directory.parent))
    with pytest.raises(lt.BundleError, match=text):
        lt.save_bundle(graphs, directory)
    assert sorted(os.listdir(directory.parent)) == before


def test_captured_without_values(bundle):
    not_saved(
        lt.capture(programs.mlp, 2), bundle, r"Capture them with capture\(\.\.\., values=True\)"
    )
    assert lt.load_bundle(bundle)


def test_backward_that_did_not_run(tmp_path):
    def program(world):
        x = torch.ones(2, requires_grad=True)
        return {"y": world.compile(lambda x: x.sin())(x)}

    graphs = lt.capture(program, 2, values=True)
    not_saved(graphs, tmp_path / "bundle", "was captured, but its backward did not run")


def test_program_with_a_graph_break(tmp_path, capsys):
    (tmp_path / "program.py").write_text(PROGRAM)
    directory = tmp_path / "bundle"
    arguments = ["graph", f"{tmp_path}/program.py:breaks", "--save-bundle", str(directory)]
    assert main(arguments) == 2
    assert "the program is not captured whole: 1 graph break (" in capsys.readouterr().err
    assert main([*arguments[:1], f"{tmp_path}/program.py:stops", *arguments[2:]]) == 2
    message = capsys.readouterr().err
    assert "stops cannot be captured whole: Call to `torch._dynamo.graph_break()`" in message
    assert "program.py" in message and "torch._dynamo.graph_break()" in message
    assert not directory.exists()


def test_directory_of_something_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    graphs = lt.capture(programs.mlp, 2, values=True)
    not_saved(graphs, tmp_path / "mine", "is there already and is no bundle. Nothing was written")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_failure_leaves_the_old_one(bundle, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    before = (bundle / manifest.FILE).read_text()
    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save(programs.uneven, 3, bundle)
    assert (bundle / manifest.FILE).read_text() == before
    assert os.listdir(bundle.parent) == ["bundle"]


def test_another_takes_its_place(bundle):
    save(programs.uneven, 3, bundle)
    assert lt.load_bundle(bundle).world_size == 3


# ---------------------------------------------------------------- lock-step
WORLD = {"w": (0, 1)}


def rank_graph(*calls):
    """A program: collectives one after the other on its input."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for op, *arguments in calls:
        target = getattr(torch.ops._c10d_functional, op).default
        value = graph.call_function(target, (value, *arguments))
    graph.output((value,))
    return fx.GraphModule(torch.nn.Module(), graph)


def lockstep(*modules, groups=WORLD):
    ranks = range(len(modules))
    return run_in_lockstep(
        dict(enumerate(modules)),
        {r: [torch.ones(2) * (r + 1)] for r in ranks},
        dict.fromkeys(ranks, groups),
        dict.fromkeys(ranks),
    )


def test_ranks_meet():
    module = rank_graph(("all_reduce", "sum", "w"), ("all_gather_into_tensor", 2, "w"))
    results, count = lockstep(module, module)
    assert count == 2
    assert results[1][0].tolist() == [3.0] * 4


def test_collectives_of_two_groups_may_start_in_any_order():
    """They are waited for later, each group on its own."""
    graphs = []
    for names in (("a", "b"), ("b", "a")):
        graph = fx.Graph()
        x = graph.placeholder("x")
        started = [
            graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", name))
            for name in names
        ]
        graph.output(tuple(started))
        graphs.append(fx.GraphModule(torch.nn.Module(), graph))
    _, count = lockstep(*graphs, groups={"a": (0, 1), "b": (1, 0)})
    assert count == 2


def test_ranks_that_differ():
    with pytest.raises(lt.CollectiveError) as caught:
        lockstep(rank_graph(("all_reduce", "sum", "w")), rank_graph(("all_reduce", "max", "w")))
    assert str(caught.value) == (
        "the next collectives of ranks [0, 1] differ: rank 0: all_reduce([2], sum) of ranks "
        "[0, 1], rank 1: all_reduce([2], max) of ranks [0, 1]. On real processes this hangs or "
        "corrupts data."
    )


def test_rank_that_never_comes():
    with pytest.raises(lt.CollectiveError) as caught:
        lockstep(rank_graph(("all_reduce", "sum", "w")), rank_graph())
    assert str(caught.value) == (
        "ranks wait for collectives that others never start: rank 0: waits in all_reduce([2], "
        "sum) of ranks [0, 1]. On real processes this hangs."
    )


def test_unknown_collective():
    module = rank_graph(("all_reduce_coalesced", "sum", "w"))
    with pytest.raises(lt.CollectiveError, match="cannot be replayed in one process"):
        lockstep(module, module)
