"""`lt.export`: exported programs of plain tensors, of all ranks together and of each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._torch import export_flat
from ..compile.fx_graphs import spell_out_keywords, write_numbers_down
from ..world.mode import maybe_disable_local_tensor_mode
from ..world.state import enabled_local_tensor_mode
from .dynamic import RankShapes, of_all_ranks
from .flat import FlatModel
from .leaves import ExportError, common_ranks
from .rank_model import RankModel, inputs_of, outputs_of
from .ranked import RankedProgram, ranked
from .state import with_own_memory
from .strict import require_traceable


class RankPrograms:
    """The exported programs of a model on simulated ranks. Made by `export`.

    Attributes:
        ranks: the ranks.
        all_ranks: one torch.export.ExportedProgram on the plain shards of all ranks. Where the
            model takes or returns a LocalTensor or DTensor it has a tuple of shards, in the order
            of `ranks`. A collective is one `localtensor::*` node, so that a process which loads the
            program must import localtensor_compile.
    """

    def __init__(self, flat: FlatModel, ranks: tuple[int, ...], program: Any) -> None:
        self.ranks = ranks
        self.all_ranks = program
        self._flat = flat
        self._made: dict[int, Any] = {}

    def __repr__(self) -> str:
        return f"RankPrograms(ranks={list(self.ranks)})"

    @functools.cached_property
    def _inputs(self) -> Any:
        return inputs_of(self.all_ranks, self._flat)

    def rank(self, rank: int) -> Any:
        """The torch.export.ExportedProgram of one rank, which a real process of it can run.

        Its inputs, outputs, parameters and buffers are that rank's, with the structure and the
        names that the model has; its collectives are torch's functional ones, on groups named by
        their ranks (`ranks:0,1`): see `connect`.

        Raises:
            ExportError: no such rank.
            ExtractError: an op that no single rank can run.
        """
        if rank not in self.ranks:
            raise ExportError(f"there is no program of rank {rank}, only of {list(self.ranks)}.")
        if rank not in self._made:
            with maybe_disable_local_tensor_mode():
                self._made[rank] = self._export_rank(rank)
        return self._made[rank]

    def _export_rank(self, rank: int) -> Any:
        program, flat = self.all_ranks, self._flat
        model = RankModel(
            program.graph_module,
            rank,
            self.ranks,
            self._inputs,
            outputs_of(program, flat, self._inputs),
            flat,
            program.constants,
        )
        rank_shapes = RankShapes(program.range_constraints)
        parts = [leaf.of_rank(rank) for leaf in flat.leaves]
        args, kwargs = pytree.tree_unflatten(parts, flat.in_spec)
        dims = [rank_shapes.of(model.values.get(i)) for i in range(len(parts))]
        dim_args, dim_kwargs = pytree.tree_unflatten(dims, flat.in_spec)
        named = dict(flat.signature.bind(*dim_args, **dim_kwargs).arguments)
        # torch 2.13 cannot take a dict with nothing in it for the arguments `**kwargs`.
        shapes = None if all(d is None for d in dims) else named
        return _saveable(export_flat(model.module, args, kwargs, shapes))


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    strict: bool = False,
) -> RankPrograms:
    """Export a model on LocalTensors to plain programs, of all ranks together and of each.

    Args:
        model: its parameters and buffers, and what it is called with, may be LocalTensors, DTensors
            of them, or plain tensors, which all ranks share. The programs share the parameters'
            memory; buffers, which programs may write to, are copied for each.
        args, kwargs: example inputs.
        dynamic_shapes: as for torch.export.export, for the model's own inputs. A dimension of
            shards that differ becomes one of its own for each rank.
        strict: whether Dynamo must be able to trace the model's Python code, as for
            torch.export.export.

    Raises:
        ExportError: nothing that ranks have a part of, or parts of different ranks.
    """
    return RankPrograms(*_exported(model, args, kwargs, dynamic_shapes, strict))


def export_ranked(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    strict: bool = False,
    preserve_module_call_signature: Sequence[str] = (),
) -> RankedProgram:
    """torch.export.export inside a mode; arguments and errors as of `export`."""
    if preserve_module_call_signature:
        raise ExportError(
            "preserve_module_call_signature is not supported inside LocalTensorMode: the program "
            "of all ranks has no submodules. Leave it out."
        )
    flat, _, program = _exported(model, args, kwargs, dynamic_shapes, strict)
    return ranked(program, flat)


def _exported(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    strict: bool,
) -> tuple[FlatModel, tuple[int, ...], Any]:
    if not isinstance(args, tuple):
        raise ExportError(f"args is a {type(args).__name__}, but must be a tuple of the inputs.")
    kwargs = dict(kwargs or {})
    mode = enabled_local_tensor_mode()
    # The parts of inputs and parameters are those of single ranks: what the model makes is alike.
    with mode.per_rank_layout() if mode else contextlib.nullcontext():
        return _traced(model, args, kwargs, dynamic_shapes, strict, mode.ranks if mode else ())


def _traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    strict: bool,
    default_ranks: Iterable[int],
) -> tuple[FlatModel, tuple[int, ...], Any]:
    from torch._dynamo.exc import InternalTorchDynamoError

    if strict:
        require_traceable(model, args, kwargs, dynamic_shapes)
    with maybe_disable_local_tensor_mode():
        flat = FlatModel(model, args, kwargs)
        shapes = of_all_ranks(model, args, kwargs, dynamic_shapes)
    of = [*flat.leaves, *(state.leaf for state in flat.states)]
    ranks = common_ranks(of, "the model and its inputs", default_ranks)
    try:
        program = export_flat(flat.module, *flat.of_all, shapes)
    except InternalTorchDynamoError as error:
        raise ExportError(
            "the model cannot be traced for all ranks together: torch.cond on shards of different "
            f"sizes, or what else Dynamo has to trace for torch.export ({_first_line(error)}). Use "
            "torch.where, or shards of one size."
        ) from error
    _require_own_buffers(program, flat)
    return flat, ranks, _saveable(program)


def _require_own_buffers(program: Any, flat: FlatModel) -> None:
    """Raise ExportError where the model writes to a buffer that is in another's memory too."""
    written = {
        output.mutates.where
        for output in outputs_of(program, flat, inputs_of(program, flat))
        if output.mutates is not None and output.mutates.kind == "state"
    }
    for state in flat.states:
        for other in flat.states if state.name in written else ():
            if other is not state and state.shares_memory_with(other):
                raise ExportError(
                    f"the model writes to {state.name}, which shares memory with {other.name}. An "
                    "exported program has each of its buffers in memory of its own, and would not "
                    f"see the change. Make one of the other in forward()."
                )


def _saveable(program: Any) -> Any:
    """As torch.export.save and load want it; no constant is part of something larger."""
    spell_out_keywords(program.graph_module)
    write_numbers_down(program)
    for name, value in program.constants.items():
        if type(value) is Tensor:
            program.constants[name] = with_own_memory(value)
    return program


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
