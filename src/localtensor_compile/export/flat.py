"""A model of all ranks whose inputs, parameters and outputs are plain tensors, one per rank.

What torch.export traces in place of the model: it makes LocalTensors of its inputs, calls the
model, and takes what that returns apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .leaves import ExportError, Leaf, take_apart, take_tree_apart
from .state import State, read, register, states_of, tensors_of


class FlatModel:
    """`model` on the parts of its inputs.

    Args:
        model: its parameters and buffers are read here, and not written.
        call: what to trace, by default the model: called as call(values, args, kwargs) with the
            values of `states` by name.

    Attributes:
        module: what torch.export can export.
        states: the parameters and buffers.
        in_names: for each leaf of the inputs what the model calls it.
        out_leaves: after tracing, the leaves of the output; `out_ranks` of each its ranks.
        out_spec: the structure of that output.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: Callable[[dict[str, Any], Any, Any], Any] | None = None,
    ) -> None:
        self.states: list[State] = states_of(model)
        leaves, self.in_spec = take_tree_apart((args, dict(kwargs)))
        self.leaves = [_apart(leaf) for leaf in leaves]
        self._keywords = list(kwargs)
        self.out_leaves: list[Leaf] = []
        self.out_spec: Any = None
        self.signature = inspect.signature(model.forward)
        self.in_names = _names(self.signature, args, kwargs)
        self._call = call or _caller(model)
        self.module = PlainModule(self.signature, self._run)
        for state in self.states:
            for name, tensor in tensors_of(state):
                register(self.module, name, tensor, state)

    @property
    def of_all(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of this model: each value of all ranks is a tuple of its parts."""
        return pytree.tree_unflatten([leaf.of_all for leaf in self.leaves], self.in_spec)

    def in_order(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """`kwargs` in the order in which they were exported, where they are the same."""
        known = {k: kwargs[k] for k in self._keywords if k in kwargs}
        return known if len(known) == len(kwargs) else dict(kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        given = [leaf.joined(v) for leaf, v in zip(self.leaves, self._split((args, kwargs)))]
        args, kwargs = pytree.tree_unflatten(given, self.in_spec)
        states = {state.name: state.leaf.joined(self._held(state)) for state in self.states}
        before = dict(states)
        result = self._call(states, args, kwargs)
        for state in self.states:
            if states[state.name] is not before[state.name]:
                self._write(state, states[state.name])
        self.out_leaves, self.out_spec = take_tree_apart(result)
        return pytree.tree_unflatten([leaf.of_all for leaf in self.out_leaves], self.out_spec)

    @property
    def out_ranks(self) -> list[tuple[int, ...]]:
        return [leaf.ranks for leaf in self.out_leaves]

    def _split(self, given: Any) -> list[Any]:
        return list(self.in_spec.flatten_up_to(given))

    def _held(self, state: State) -> Any:
        if not state.leaf.ranks:
            return read(self.module, state.name)
        return [read(self.module, state.name_of(r)) for r in state.leaf.ranks]

    def _write(self, state: State, value: Any) -> None:
        """The model has put another tensor in the place of a buffer."""
        leaf = take_apart(value)
        if leaf.ranks != state.leaf.ranks:
            raise ExportError(
                f"the model puts a tensor of ranks {list(leaf.ranks)} in the place of "
                f"{state.name}, which is one of ranks {list(state.leaf.ranks)}. Keep it of the "
                "same ranks, so that every rank's program has it."
            )
        for rank, part in zip(state.leaf.ranks or (None,), leaf.parts):
            read(self.module, state.name_of(rank)).copy_(part)


def _apart(leaf: Leaf) -> Leaf:
    """Rows of one stack in memory of their own: Dynamo does not export parts of a larger tensor."""
    memory = {p.untyped_storage()._cdata for p in leaf.parts if isinstance(p, Tensor)}
    if len(leaf.parts) < 2 or len(memory) != 1:
        return leaf
    copies = tuple(part.detach().clone() for part in leaf.parts)
    dense = all(new.stride() == part.stride() for new, part in zip(copies, leaf.parts))
    return replace(leaf, parts=copies) if dense else leaf


def _caller(model: nn.Module) -> Callable[[dict[str, Any], Any, Any], Any]:
    def call(states: dict[str, Any], args: Any, kwargs: Any) -> Any:
        # It puts what the model assigns to a buffer into `states`.
        return torch.func.functional_call(model, states, args, kwargs)

    return call


class PlainModule(nn.Module):
    """A module of plain tensors that runs `run`, and has no attributes of its own that could be in
    the place of a model's parameters.

    Args:
        signature: torch.export names inputs, and looks dynamic shapes up, by that of forward.
    """

    def __init__(self, signature: inspect.Signature, run: Callable[..., Any]) -> None:
        super().__init__()

        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        object.__setattr__(self, "forward", forward)


def _names(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[str]:
    """`x`, `others[0]`, ...: the leaves of (args, kwargs) by the names of the parameters."""
    positional = list(signature.bind_partial(*args).arguments.items())
    named: dict[str, Any] = {}
    for name, value in positional:
        if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}[{i}]": v for i, v in enumerate(value)})
        else:
            named[name] = value
    named.update(kwargs)
    paths, _ = pytree.tree_flatten_with_path(list(named.values()))
    names = list(named)
    return [names[path[0].idx] + pytree.keystr(path[1:]) for path, _ in paths]
