"""dynamic_shapes: of the program of all ranks, and of the program of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from torch import Tensor, nn
from torch.export import AdditionalInputs, Dim, ShapesCollection
from torch.utils import _pytree as pytree

from .conditions import is_symbolic
from .leaves import ExportError, Leaf, take_apart


def of_all_ranks(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> Any:
    """`dynamic_shapes` of a model, for the parts of its inputs.

    A dimension has one Dim for all ranks where their shards have the same size, which then stays
    the same on all of them, and else a Dim per rank (`rows_rank0`, ...).
    """
    if dynamic_shapes is None:
        return None
    if isinstance(dynamic_shapes, AdditionalInputs):
        raise ExportError(
            "AdditionalInputs cannot say which sizes of LocalTensors differ. Give dynamic_shapes "
            "Dim.DYNAMIC for these dimensions."
        )
    if isinstance(dynamic_shapes, ShapesCollection):
        dynamic_shapes = dynamic_shapes.dynamic_shapes(model, args, kwargs)
    named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    if not isinstance(dynamic_shapes, Mapping) and len(dynamic_shapes) == len(named):
        dynamic_shapes = dict(zip(named, dynamic_shapes))
    uneven: set[str] = set()

    def note(leaf: Leaf, spec: Any) -> None:
        uneven.update(_uneven(leaf, spec))

    _each(named, dynamic_shapes, note)
    dims: dict[tuple[str, int], Any] = {}
    return _each(named, dynamic_shapes, lambda leaf, spec: _expanded(leaf, spec, uneven, dims))


def _each(value: Any, spec: Any, use: Callable[[Leaf, Any], Any]) -> Any:
    """`use(leaf, its dimensions)` for each tensor, in the structure of `value`."""
    leaf = take_apart(value)
    if leaf.ranks and (spec is None or not isinstance(leaf.parts[0], Tensor)):
        return (spec,) * len(leaf.ranks)
    if isinstance(leaf.parts[0], Tensor):
        return use(leaf, spec) if spec is not None else None
    children = _children(value)
    if children is None:
        return spec
    if spec is None:
        spec = dict.fromkeys(children) if isinstance(children, dict) else [None] * len(children)
    if isinstance(children, dict):
        if not isinstance(spec, Mapping) or set(spec) != set(children):
            raise ExportError(
                f"dynamic_shapes has {spec!r} for inputs named {', '.join(map(str, children))}. "
                "Give it a dict with the same keys."
            )
        return {k: _each(v, spec[k], use) for k, v in children.items()}
    if isinstance(spec, Mapping) or len(spec) != len(children):
        raise ExportError(
            f"dynamic_shapes has {spec!r} for a sequence of {len(children)} inputs. Give it a "
            "sequence of as many."
        )
    found = [_each(v, s, use) for v, s in zip(children, spec)]
    return tuple(found) if isinstance(value, tuple) else found  # torch compares the types


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple)):
        return list(value)
    node = pytree.SUPPORTED_NODES.get(type(value))
    return None if node is None else list(node.flatten_fn(value)[0])


def _by_dimension(spec: Any) -> dict[int, Any]:
    return dict(spec) if isinstance(spec, Mapping) else dict(enumerate(spec))


def _uneven(leaf: Leaf, spec: Any) -> set[str]:
    """Names of the Dims of dimensions in which the ranks' parts differ."""
    return {
        _root(dim).__name__
        for d, dim in _by_dimension(spec).items()
        if hasattr(dim, "__name__") and len({part.shape[d] for part in leaf.parts}) > 1
    }


def _root(dim: Any) -> Any:
    return getattr(dim, "root", dim)


def _expanded(leaf: Leaf, spec: Any, uneven: set[str], dims: dict[tuple[str, int], Any]) -> Any:
    if not leaf.ranks:
        return spec
    return tuple(
        {d: _for_rank(dim, rank, uneven, dims) for d, dim in _by_dimension(spec).items()}
        for rank in leaf.ranks
    )


def _for_rank(dim: Any, rank: int, uneven: set[str], dims: dict[tuple[str, int], Any]) -> Any:
    root = _root(dim)
    name = getattr(root, "__name__", None)
    if name is None or name not in uneven:
        return dim
    key = name, rank
    if key not in dims:
        dims[key] = Dim(f"{name}_rank{rank}", min=root.min, max=root.max)
    return dims[key] if root is dim else dim.fn(dims[key])


# ---------------------------------------------------------------- of one rank
class RankShapes:
    """The dynamic dimensions of one rank's program, as the program of all ranks has them.

    Args:
        ranges: the range of each symbol there.
    """

    def __init__(self, ranges: Mapping[Any, Any]) -> None:
        self._ranges = ranges

    def of(self, value: Any) -> Any:
        """The dimensions of an input with the fake value `value`; None if all are static."""
        if is_symbolic(value):
            return self._dim(value.node.expr)
        if not isinstance(value, Tensor):
            return None
        dims = {d: self._dim(s.node.expr) for d, s in enumerate(value.shape) if is_symbolic(s)}
        return dims or None

    def _dim(self, expression: Any) -> Any:
        """Which sizes are equal, or multiples of others, torch finds out by itself."""
        found = self._ranges.get(expression) if isinstance(expression, sympy.Symbol) else None
        if found is None:
            return Dim.DYNAMIC
        limits = {"min": int(found.lower)}
        if found.upper.is_Integer:
            limits["max"] = int(found.upper)
        return Dim.DYNAMIC(**limits)
