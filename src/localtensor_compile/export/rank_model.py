"""The extracted program of one rank as a module that torch.export can export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree

from ..compile.extract import extract_rank, group_ranks
from ..compile.fx_graphs import leaves, placeholders
from .conditions import conditions
from .flat import FlatModel, PlainModule
from .state import State, read, register


@dataclass(frozen=True)
class Input:
    """A placeholder of the graph of all ranks.

    Attributes:
        kind: "state", "constant" or "user".
        where: of a state its name in the model, of a constant its name in the exported program, of
            the user's inputs its number among the leaves.
        rank: whose it is; None for what all ranks have.
    """

    kind: str
    where: Any
    rank: int | None


@dataclass(frozen=True)
class Output:
    """An output of the graph of all ranks: a leaf that is returned, or a new value of an input."""

    rank: int | None
    mutates: Input | None


def inputs_of(program: Any, flat: FlatModel) -> list[Input]:
    """What the placeholders of the exported program of `flat` are."""
    of_states = {
        state.name_of(rank): Input("state", state.name, rank)
        for state in flat.states
        for rank in state.leaf.ranks or (None,)
    }
    user = iter(_user_inputs(program, flat))
    found = []
    for spec in program.graph_signature.input_specs:
        kind = spec.kind.name
        if kind == "USER_INPUT":
            found.append(next(user))
        elif kind in ("PARAMETER", "BUFFER"):
            found.append(of_states[spec.target])
        else:
            found.append(Input("constant", spec.target, None))
    return found


def _user_inputs(program: Any, flat: FlatModel) -> list[Input]:
    labels = [
        tuple(Input("user", i, rank) for rank in leaf.ranks)
        if leaf.ranks
        else Input("user", i, None)
        for i, leaf in enumerate(flat.leaves)
    ]
    given = pytree.tree_unflatten(labels, flat.in_spec)
    return program.call_spec.in_spec.flatten_up_to(given)


def outputs_of(program: Any, flat: FlatModel, inputs: Sequence[Input]) -> list[Output]:
    """What the outputs of the exported program of `flat` are."""
    by_target = {
        spec.target: known
        for spec, known in zip(program.graph_signature.input_specs, inputs)
        if spec.target is not None
    }
    by_name = {n.name: known for n, known in zip(placeholders(program.graph_module), inputs)}
    returned = iter([rank for ranks in flat.out_ranks for rank in ranks or (None,)])
    found = []
    for spec in program.graph_signature.output_specs:
        if spec.kind.name == "USER_OUTPUT":
            found.append(Output(next(returned), None))
        else:
            mutated = (by_name if spec.kind.name == "USER_INPUT_MUTATION" else by_target)[
                spec.target
            ]
            found.append(Output(mutated.rank, mutated))
    return found


class RankModel:
    """One rank's program: its parameters and buffers, its inputs and outputs.

    Args:
        module: the graph of all ranks.
        rank: whose program.
        ranks: all ranks.
        inputs, outputs: what the placeholders and outputs of `module` are.
        flat: what was exported.
        constants: tensors that the program holds.

    Attributes:
        module: what torch.export can export.
        values: the user's inputs by number, as they were traced.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        rank: int,
        ranks: Sequence[int],
        inputs: Sequence[Input],
        outputs: Sequence[Output],
        flat: FlatModel,
        constants: Mapping[str, Any],
    ) -> None:
        self.rank = rank
        self.module = PlainModule(flat.signature, self._run)
        self._graph = extract_rank(
            module,
            rank,
            ranks=ranks,
            inputs=[known.rank for known in inputs],
            outputs=[known.rank for known in outputs],
        )
        nodes = placeholders(module)
        own = {n.name: known for n, known in zip(nodes, inputs) if known.rank in (rank, None)}
        self.values = {
            known.where: n.meta["val"]
            for n, known in zip(nodes, inputs)
            if known.kind == "user" and known.rank in (rank, None)
        }
        self._given = [own[n.name] for n in placeholders(self._graph)]
        self._outputs = [known for known in outputs if known.rank in (rank, None)]
        self._in_spec, self._out_spec = flat.in_spec, flat.out_spec
        self._conditions = conditions(self.values, rank)
        for state in flat.states:
            self._register(state)
        for known in self._given:
            if known.kind == "constant":
                setattr(self.module, known.where, constants[known.where])

    def _register(self, state: State) -> None:
        if not state.leaf.ranks or self.rank in state.leaf.ranks:
            register(self.module, state.name, state.leaf.of_rank(self.rank), state)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        user = self._in_spec.flatten_up_to((args, kwargs))
        for holds in self._conditions:
            torch._check(holds(user))
        given = [
            user[known.where] if known.kind == "user" else read(self.module, known.where)
            for known in self._given
        ]
        results = list(leaves(_Runner(self._graph).run(*given)))
        returned = []
        for known, value in zip(self._outputs, results):
            if known.mutates is None:
                returned.append(value)
            elif known.mutates.kind == "user":
                user[known.mutates.where].copy_(value)
            else:
                read(self.module, known.mutates.where).copy_(value)
        return pytree.tree_unflatten(returned, self._out_spec)


class _Runner(fx.Interpreter):
    """Runs an extracted graph without the group being there: torch's fake of one op asks for it."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops._dtensor.shard_dim_alltoall.default:
            return _shard_dim_alltoall(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _shard_dim_alltoall(x: Tensor, gather_dim: int, shard_dim: int, group: str) -> Tensor:
    """DTensor's op by the functional collective: piece k of each rank goes to rank k."""
    size = len(group_ranks(group))
    pieces = torch.chunk(x, size, shard_dim)
    splits = [pieces[0].shape[0]] * size
    functional = torch.ops._c10d_functional
    received = functional.all_to_all_single(torch.cat(pieces), splits, splits, group)
    return torch.cat(torch.split(functional.wait_tensor(received), splits), gather_dim)
