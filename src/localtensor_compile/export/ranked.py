"""What torch.export.export returns inside a LocalTensorMode: one program for all ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..world.mode import maybe_disable_local_tensor_mode
from .fit import require_fitting
from .flat import FlatModel
from .leaves import take_tree_apart


class RankedProgram(ExportedProgram):
    """An ExportedProgram whose graph is on the plain shards of all ranks.

    `module()` takes and returns what the model does: LocalTensors, DTensors, per-rank numbers. As
    an ExportedProgram it takes and returns a tuple of shards for each of them, and so it is saved:
    torch.export.load gives the plain program, which runs without this package but for the
    `localtensor::*` ops of its collectives.
    """

    _flat: FlatModel

    def module(self, check_guards: bool = True) -> nn.Module:
        """A module that is called like the model; its results need no gradients.

        Its inputs must have the sizes, on every rank, that were exported, or others that
        `dynamic_shapes` allows. What `check_guards` turns off are torch's checks of values.
        """
        with maybe_disable_local_tensor_mode():
            return RankedModule(super().module(check_guards), self)

    def run_decompositions(self, *args: Any, **kwargs: Any) -> RankedProgram:
        """As of any ExportedProgram."""
        with maybe_disable_local_tensor_mode():
            return ranked(self.plain().run_decompositions(*args, **kwargs), self._flat)

    def plain(self) -> ExportedProgram:
        """The same program as any other ExportedProgram, whose module takes the shards.

        For what asks a program for its module, as torch._inductor.aoti_compile_and_package does.
        """
        program = copy.copy(self)
        program.__class__ = ExportedProgram
        return program


def ranked(program: ExportedProgram, flat: FlatModel) -> RankedProgram:
    """`program`, the export of `flat`, as one that knows what its inputs and outputs belong to."""
    program.__class__ = RankedProgram
    program._flat = flat
    return program


class RankedModule(nn.Module):
    """Calls a program of all ranks with LocalTensors.

    Attributes:
        of_all_ranks: the module of plain shards.
    """

    def __init__(self, of_all_ranks: nn.Module, program: RankedProgram) -> None:
        super().__init__()
        self.of_all_ranks = of_all_ranks
        self._program = program

    @property
    def graph(self) -> fx.Graph:
        """The graph on the plain shards of all ranks."""
        return self.of_all_ranks.graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model, with its inputs checked."""
        flat = self._program._flat
        leaves, spec = take_tree_apart((args, flat.in_order(kwargs)))
        require_fitting(self._program, flat, leaves, spec)
        values = [leaf.of_all for leaf in leaves]
        given: tuple[tuple[Any, ...], Mapping[str, Any]] = pytree.tree_unflatten(values, spec)
        with torch.no_grad(), maybe_disable_local_tensor_mode():
            result = self.of_all_ranks(*given[0], **given[1])
        found = flat.out_spec.flatten_up_to(result)
        return pytree.tree_unflatten(
            [_constant(leaf.joined(value)) for leaf, value in zip(flat.out_leaves, found)],
            flat.out_spec,
        )


def _constant(value: Any) -> Any:
    """Without the gradient that the model's output would have."""
    return value.requires_grad_(False) if isinstance(value, Tensor) and value.is_leaf else value
