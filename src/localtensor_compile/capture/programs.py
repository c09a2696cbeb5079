"""The program of each rank, out of the graph of all: joint, and cut into forward and backward.

The cut is made in the rank's own joint graph, as its own process would make it: in the graph of all
ranks, what to save and what to compute again may be decided otherwise from rank to rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.fx as fx
from torch import Tensor

from ..compile.extract import extract_rank
from ..compile.functional_nodes import PER_RANK, ExtractError
from ..compile.fx_graphs import leaves, output_node, placeholders
from ..compile.owners import Owner, owners
from .names import SAVED, Known, input_of, is_stack, output_of
from .record import BACKWARD, FORWARD, JOINT, Recorded, copied


@dataclass(frozen=True)
class FlatGraph:
    """A graph whose inputs are the shards of all ranks, and what its inputs and outputs are."""

    module: fx.GraphModule
    inputs: tuple[Known, ...]
    outputs: tuple[Known, ...]
    ranks: tuple[int, ...]


def flat_graph(
    module: fx.GraphModule, names: Sequence[tuple[str, str]], ranks: Sequence[int]
) -> FlatGraph:
    """`module` with its descriptors read, and names for its lines in the nodes' meta.

    Raises:
        ExtractError: an input is a stack of the shards of all ranks.
    """
    nodes = placeholders(module)
    for node in nodes:
        if is_stack(node):
            raise ExtractError(
                f"{input_of(node, names).label} holds the shards of all ranks in one tensor "
                f"(layout='stacked'), but captured graphs are those of single ranks. {PER_RANK}."
            )
    inputs = tuple(input_of(node, names) for node in nodes)
    for node in module.graph.nodes:
        node.meta["flat_name"] = node.name
    for node, known in zip(nodes, inputs):
        node.meta["user_name"], node.meta["input_kind"] = known.label, known.kind
    owner = owners(module, [known.rank for known in inputs], ranks=ranks)
    return FlatGraph(module, inputs, tuple(_outputs(module, names, owner)), tuple(ranks))


def rank_programs(recorded: Recorded, flat: FlatGraph, rank: int) -> dict[str, fx.GraphModule]:
    """The graphs of one rank: `joint`, `forward`, `backward`; without gradients, `forward`."""
    outputs = [known for known in flat.outputs if known.rank in (rank, None)]
    module = extract_rank(
        flat.module,
        rank,
        ranks=flat.ranks,
        inputs=[known.rank for known in flat.inputs],
        outputs=[known.rank for known in flat.outputs],
    )
    labels = [known.label for known in outputs]
    output_node(module).meta["user_names"] = labels
    if JOINT not in recorded.graphs:
        return {FORWARD: module}
    count = sum(k.rank in (rank, None) for k in flat.outputs[: recorded.forward_outputs])
    forward, backward = _cut(module, count, _static_inputs(recorded, flat, rank, module))
    saved = len(list(leaves(output_node(forward).args[0]))) - count
    output_node(forward).meta["user_names"] = labels[:count] + [SAVED] * saved
    output_node(backward).meta["user_names"] = labels[count:]
    for node in placeholders(backward):
        if node.meta.get("input_kind") != "tangent":
            node.meta = {**node.meta, "input_kind": SAVED}
    return {JOINT: module, FORWARD: forward, BACKWARD: backward}


def _static_inputs(
    recorded: Recorded, flat: FlatGraph, rank: int, module: fx.GraphModule
) -> list[int]:
    """Which inputs of a rank's graph AOTAutograd tells the partitioner to be static.

    It counts the user's inputs, subclasses not yet taken apart, and the partitioner takes the
    numbers for those of the flat graph, on real ranks too: there the tensor and the mesh of a
    DTensor are two inputs.
    """
    nodes = zip(placeholders(flat.module), flat.inputs)
    own = [node.name for node, known in nodes if known.rank in (rank, None)]
    static = {own[i] for i in recorded.static_inputs if i < len(own)}
    return [i for i, n in enumerate(placeholders(module)) if n.meta["flat_name"] in static]


def _cut(
    joint: fx.GraphModule, forward_outputs: int, static_inputs: list[int]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    return min_cut_rematerialization_partition(
        copied(joint),
        None,
        num_fwd_outputs=forward_outputs,
        static_lifetime_input_indices=static_inputs,
    )


def _outputs(
    module: fx.GraphModule, names: Sequence[tuple[str, str]], owner: Mapping[fx.Node, Owner]
) -> Iterator[Known]:
    node = output_node(module)
    values = list(leaves(node.args[0]))
    for value, desc in zip(values, node.meta.get("desc") or [None] * len(values)):
        known = Known("", "return", None) if desc is None else output_of(desc, names)
        rank = known.rank
        if rank is None and isinstance(value, fx.Node) and _is_tensor(value):
            of = owner[value]
            rank = next(iter(of)) if len(of) == 1 else None
        yield Known("", known.label, rank)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
