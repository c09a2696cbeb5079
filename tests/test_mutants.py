"""Mutants of captured graphs: each is seen by the golden text, and named by its explanation."""

import copy
import functools

import pytest
import torch
import torch.fx as fx

import localtensor_compile as lt
from localtensor_compile.compile.extract import group_name
from localtensor_compile.golden.diff import explain
from localtensor_compile.golden.text import read
from tests import graph_programs as programs
from tests.parallel import context_parallel, tensor_parallel

C = torch.ops._c10d_functional
PROGRAMS = {
    "mlp": (programs.mlp, 4),
    "grid": (programs.grid, 4),
    "uneven": (programs.uneven, 4),
    "tensor parallel": (functools.partial(tensor_parallel.mlp, hidden=7), 3),
    "ring": (functools.partial(context_parallel.attention, form="ring", causal=True), 2),
}


@functools.cache
def captured(name):
    program, size = PROGRAMS[name]
    graphs = lt.capture(program, size)
    return graphs, str(graphs)


# ---------------------------------------------------------------- mutations of one rank's graph
def collectives(graph):
    return [n for n in graph.nodes if getattr(n.target, "namespace", "") == "_c10d_functional"
            and n.target is not C.wait_tensor.default]  # fmt: skip


def drop(graph, index=0):
    """The operand goes on in place of the result; cut or repeated to its shape."""
    node = collectives(graph)[index]
    (wait,) = node.users
    wait.replace_all_uses_with(node.args[0])
    graph.erase_node(wait)
    graph.erase_node(node)


def reduce_op(graph, index=0, op="max"):
    node = [n for n in collectives(graph) if n.target is C.all_reduce.default][index]
    node.update_arg(1, op if node.args[1] != op else "min")


def group(graph, ranks, index=0):
    node = collectives(graph)[index]
    place = [a.name for a in node.target._schema.arguments].index("group_name")
    node.update_arg(place, group_name(ranks))


def move(graph, target):
    """The first such op that does not need it, to after the next collective; else before."""
    for node in graph.nodes:
        if node.target is not target:
            continue
        for collective in collectives(graph):
            wait = next(iter(collective.users))
            after = list(graph.nodes)
            if after.index(node) < after.index(collective) and not _needs(collective, node):
                users = [after.index(u) for u in node.users]
                if min(users, default=len(after)) > after.index(wait):
                    wait.append(node)
                    return
            if after.index(node) > after.index(wait) and not _needs(node, collective):
                operands = [after.index(n) for n in node.all_input_nodes]
                if max(operands, default=-1) < after.index(collective):
                    collective.prepend(node)
                    return
    raise AssertionError(f"no {target} can be moved")


def _needs(node, other):
    seen, left = set(), [node]
    while left:
        n = left.pop()
        if n is other:
            return True
        if n not in seen:
            seen.add(n)
            left += n.all_input_nodes
    return False


def argument(graph, target, place, value, index=0):
    node = [n for n in graph.nodes if n.target is target][index]
    assert node.args[place] != value
    node.update_arg(place, value)


def swap_operands(graph, target, index=0):
    node = [n for n in graph.nodes if n.target is target][index]
    a, b, *rest = node.args
    node.args = (b, a, *rest)


def replace_op(graph, old, new, index=0):
    node = [n for n in graph.nodes if n.target is old][index]
    node.target = new


def insert_after(graph, target, op, index=0):
    node = [n for n in graph.nodes if n.target is target][index]
    with graph.inserting_after(node):
        new = graph.call_function(op, (node,))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


aten = torch.ops.aten
ALL = None
# name: (program, graph, ranks that are mutated, mutation, arguments, op named)
MUTANTS = {
    # ---- a collective is dropped
    "drop forward": ("mlp", "forward", ALL, drop, {}, "all_reduce"),
    "drop on rank 2": ("mlp", "forward", (2,), drop, {}, "all_reduce"),
    "drop backward": ("mlp", "backward", ALL, drop, {}, "all_reduce"),
    "drop first of two": ("grid", "forward", ALL, drop, {}, "all_reduce"),
    "drop second of two": ("grid", "forward", ALL, drop, {"index": 1}, "all_reduce"),
    "drop gather": ("uneven", "forward", ALL, drop, {}, "all_gather_into_tensor"),
    "drop in tensor parallel": ("tensor parallel", "forward", ALL, drop, {}, "all_reduce"),
    # ---- a group is swapped
    "tp for dp": ("grid", "forward", ALL, "swap", {"index": 0}, "all_reduce"),
    "dp for tp": ("grid", "forward", ALL, "swap", {"index": 1}, "all_reduce"),
    "tp for the world": ("grid", "forward", ALL, group, {"ranks": (0, 1, 2, 3)}, "all_reduce"),
    "another group on ranks 0, 1": ("mlp", "forward", (0, 1), group, {"ranks": (0, 1)}, "all_reduce"),
    "gather in half": ("uneven", "forward", (0, 1), group, {"ranks": (0, 1)}, "all_gather_into_tensor"),
    "backward group": ("mlp", "backward", (2, 3), group, {"ranks": (2, 3)}, "all_reduce"),
    # ---- another reduction
    "max": ("mlp", "forward", ALL, reduce_op, {}, "all_reduce"),
    "min": ("mlp", "forward", ALL, reduce_op, {"op": "min"}, "all_reduce"),
    "max on rank 1": ("mlp", "forward", (1,), reduce_op, {}, "all_reduce"),
    "max backward": ("mlp", "backward", ALL, reduce_op, {}, "all_reduce"),
    "second reduction": ("grid", "forward", ALL, reduce_op, {"index": 1, "op": "sum"}, "all_reduce"),
    "sum for max on rank 3": ("grid", "forward", (3,), reduce_op, {"index": 1, "op": "avg"}, "all_reduce"),
    # ---- an op moves across a collective
    "t before": ("mlp", "forward", ALL, move, {"target": aten.t.default}, "aten.t"),
    "t on rank 0": ("mlp", "forward", (0,), move, {"target": aten.t.default}, "all_reduce"),  # moved the other way
    "t backward": ("mlp", "backward", ALL, move, {"target": aten.t.default}, "aten.t"),
    "t in tensor parallel": ("tensor parallel", "forward", ALL, move, {"target": aten.t.default}, "aten.t"),
    # ---- one rank's slice
    "slice of rank 2": ("uneven", "forward", (2,), argument, {"target": aten.slice.Tensor, "place": 2, "value": 1}, "aten.slice.Tensor"),
    "slice of rank 0": ("uneven", "forward", (0,), argument, {"target": aten.slice.Tensor, "place": 3, "value": 7}, "aten.slice.Tensor"),
    "slice of all": ("uneven", "forward", ALL, argument, {"target": aten.slice.Tensor, "place": 3, "value": 7}, "aten.slice.Tensor"),
    "padding of rank 3": ("uneven", "forward", (3,), argument, {"target": aten.constant_pad_nd.default, "place": 2, "value": 1.0}, "aten.constant_pad_nd"),
    # ---- anything else
    "factor": ("grid", "forward", ALL, argument, {"target": aten.mul.Tensor, "place": 1, "value": 3}, "aten.mul.Tensor"),
    "factor of rank 1": ("grid", "forward", (1,), argument, {"target": aten.mul.Tensor, "place": 1, "value": 3}, "aten.mul.Tensor"),
    "operands": ("mlp", "backward", ALL, swap_operands, {"target": aten.mm.default}, "aten.mm"),
    "operands of rank 3": ("mlp", "backward", (3,), swap_operands, {"target": aten.mm.default, "index": 2}, "aten.mm"),
    "relu": ("mlp", "forward", ALL, replace_op, {"old": aten.gelu.default, "new": aten.relu.default}, "aten.relu"),
    "relu on rank 1": ("mlp", "forward", (1,), replace_op, {"old": aten.gelu.default, "new": aten.relu.default}, "aten.relu"),
    "a clone": ("mlp", "forward", ALL, insert_after, {"target": aten.mm.default, "op": aten.clone.default}, "aten.clone"),
    "a clone on rank 2": ("mlp", "forward", (2,), insert_after, {"target": aten.mm.default, "op": aten.clone.default}, "aten.clone"),
    "a hop of the ring": ("ring", "forward", ALL, drop, {}, "all_to_all_single"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant(name):
    program, title, ranks, mutate, options, op = MUTANTS[name]
    graphs, text = captured(program)
    mutated = copy.copy(graphs)
    programs = {t: dict(p) for t, p in graphs._programs.items()}
    for cached in ("_steps", "document"):
        mutated.__dict__.pop(cached, None)
    mutated.__dict__["_programs"] = programs
    concerned = tuple(range(graphs.world_size)) if ranks is ALL else ranks
    for rank in concerned:
        module = programs[title][rank]
        graph = fx.Graph()
        output = graph.graph_copy(module.graph, {})
        graph.output(output).meta.update(list(module.graph.nodes)[-1].meta)
        if mutate == "swap":
            other = [(0, 1), (2, 3)] if options["index"] else [(0, 2), (1, 3)]
            group(graph, next(g for g in other if rank in g), **options)
        else:
            mutate(graph, **options)
        graph.lint()
        programs[title][rank] = fx.GraphModule(module, graph)
    changed = str(mutated)
    assert changed != text
    changes = explain(read(text), read(changed))
    found = [c for c in changes if c.graph == title and c.op == op]
    assert found, list(map(str, changes))
    assert any(set(concerned) == set(c.ranks) for c in found), list(map(str, changes))
    with pytest.raises(lt.GoldenMismatch):
        from localtensor_compile.golden.files import assert_same

        assert_same(text, changed, name="the golden")
