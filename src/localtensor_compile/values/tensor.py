"""LocalTensor: one tensor per simulated rank behind one tensor.

A wrapper subclass without behaviour of its own: ops go to the handlers in op_table, one per op.
Sizes, strides and storage offset come from the shards' Python attributes, never from ops run on
them: running ops there corrupts functionalization.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._torch import (
    AsyncCollectiveTensor,
    FakeTensor,
    FunctionalTensor,
    disable_dynamo,
    mark_constructor_exportable,
    never_traced,
    own_frame_never_compiled,
    tracing_active,
)
from ..errors import PlainTensorError, ShardError, UnsupportedError
from .equal import reconcile_when_run, require_equal, same_values
from .int_node import LocalIntNode, make_int
from .op_table import _chosen, handler_of, on_stacks
from .rank_node import LocalNode, is_ranked
from .shard_checks import NO_KEYS, SHARD_TYPES, checked, disagreement, extra_keys
from .stack import ShardsOfStack, StackedRanks, made, rank_set

_PREFIX = "_local_tensor_"

cache_key_context: Callable[[], str] = str
"""Text about the world that compiled code depends on; set by collectives.groups."""

_NoTorchFunction = torch._C.DisableTorchFunction


class _SizesDiffer:
    """Whether this process ever made a LocalTensor whose shards differ in size or stride."""

    ever = False


sizes_differ = _SizesDiffer()


class LocalTensor(Tensor):
    """A tensor distributed over simulated ranks: holds the local shard of each.

    An op on LocalTensors runs on the shards of every rank; a collective combines them as real
    processes would. Where all shards have the same size, `shape` is that size; a dimension in
    which they differ is a `torch.SymInt` with a value per rank. Autograd works on the LocalTensor,
    not on its shards.

    Args:
        local_tensors: global rank -> that rank's shard. Shards agree in dtype, device, layout and
            number of dimensions; sizes, strides and storage offsets may differ.
        requires_grad: whether autograd records operations on the LocalTensor.

    Raises:
        ShardError: no ranks, a rank that is no non-negative int, a shard that is no tensor, is a
            LocalTensor itself, is of an unknown tensor subclass or requires grad, or shards that
            disagree in dtype, device, layout, number of dimensions or conj/neg bit.
    """

    _local_tensors: Mapping[int, Tensor]
    _ranks: frozenset[int]
    _size: tuple[Any, ...]
    _stride: tuple[Any, ...]

    @staticmethod
    @disable_dynamo
    def __new__(
        cls,
        local_tensors: Mapping[int, Tensor],
        requires_grad: bool = False,
    ) -> LocalTensor:
        return _wrap(_checked_shards(local_tensors), requires_grad)

    @disable_dynamo
    @mark_constructor_exportable
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    # ---- the protocol of traceable wrapper subclasses
    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, ...]]:
        """One attribute per rank, in rank order, or the one stack; the ranks are metadata."""
        shards = self._local_tensors
        if type(shards) is ShardsOfStack:
            return ["_stack"], StackedRanks(shards.ranks, shards.shift)
        ranks = tuple(shards)
        return [f"{_PREFIX}{r}" for r in ranks], ranks

    @staticmethod
    def __tensor_unflatten__(
        inner_tensors: Mapping[str, Tensor],
        flatten_spec: tuple[int, ...],
        outer_size: Any,
        outer_stride: Any,
    ) -> LocalTensor:
        """Sizes are those of the shards; `outer_size` only tells which symbols stand for them."""
        if type(flatten_spec) is StackedRanks:
            stack, ranks = inner_tensors["_stack"], tuple(flatten_spec)
            return _wrap_stacked(stack, ranks, shift=flatten_spec.shift)
        result = _wrap({r: inner_tensors[f"{_PREFIX}{r}"] for r in flatten_spec})
        if outer_size is not None:
            mine_all = (*result._size, *result._stride)
            for mine, outer in zip(mine_all, (*outer_size, *outer_stride)):
                if (
                    isinstance(mine, torch.SymInt)
                    and isinstance(mine.node, LocalIntNode)
                    and isinstance(outer, torch.SymInt)
                    and not isinstance(outer.node, LocalNode)
                ):
                    mine.node._outer_expr = outer.node.expr
        return result

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, as text that is the same in every process."""
        first, held = self._one, self._local_tensors
        inner = [(held.ranks, first)] if isinstance(held, ShardsOfStack) else list(held.items())
        shards = [
            (r, type(t).__name__, str(tuple(t.shape)), str(t.stride()), str(t.storage_offset()))
            for r, t in inner
        ]
        kind = (str(self.dtype), str(self.device), str(self.layout), str(extra_keys(first)))
        text = f"LocalTensor;{kind};{shards};{self.requires_grad};{cache_key_context()}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def __coerce_same_metadata_as_tangent__(
        self, metadata: Any, expected_type: type | None = None
    ) -> LocalTensor | None:
        return self if expected_type is None or expected_type is LocalTensor else None

    def __coerce_tangent_metadata__(self) -> LocalTensor:
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    @never_traced
    def __torch_dispatch__(
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for t in types:
            if t is not cls and t not in SHARD_TYPES:
                return _defer(func, types, args, kwargs or {})
        handler = _chosen.get(func)
        if handler is None:
            handler = handler_of(func)
        # A function mode that backward put back must not see every op on every shard.
        with _NoTorchFunction():
            if made.any:
                return on_stacks.run(handler, func, args, kwargs or {})
            return handler(func, args, kwargs or {})

    # ---- the stacked layout
    @property
    def _stack(self) -> Tensor:
        """The shards of all ranks in one tensor, in the stacked layout. AOTAutograd replaces it."""
        shards = self._local_tensors
        if type(shards) is ShardsOfStack:
            return shards.stack
        raise AttributeError("this LocalTensor holds a tensor per rank, not one stack of them")

    @_stack.setter
    def _stack(self, value: Tensor) -> None:
        held = self._local_tensors
        shift = held.shift if type(held) is ShardsOfStack else 0
        self._local_tensors = ShardsOfStack(value, tuple(held), shift)

    @property
    def _one(self) -> Tensor:
        """A tensor that is of the kind of all shards: the stack, or one shard."""
        shards = self._local_tensors
        if type(shards) is ShardsOfStack:
            return shards.stack
        return next(iter(shards.values()))

    # ---- x.data
    @property
    def data(self) -> Tensor:
        """The tensor without its history, on the same memory."""
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        """Hold the shards of another LocalTensor from now on, with their memory.

        Raises:
            PlainTensorError: the value is a plain tensor.
            ShardError: the value is of other ranks.
        """
        if isinstance(value, AsyncCollectiveTensor):
            value = value.wait()
        if isinstance(value, LocalTensor):
            if value._ranks != self._ranks:
                raise ShardError(
                    f"tensor.data = ... of a LocalTensor of ranks {sorted(self._ranks)} got one of "
                    f"ranks {sorted(value._ranks)}. Give it a tensor of the same ranks."
                )
        elif isinstance(value, Tensor):
            raise PlainTensorError(
                "tensor.data = ... of a LocalTensor got a plain tensor of shape "
                f"{tuple(value.shape)}, whose one memory cannot be that of several ranks. Copy it "
                "to every rank first, with lt.replicate(tensor)."
            )
        torch._C.TensorBase.data.__set__(self, value)
        held = value._local_tensors
        self._local_tensors = held if type(held) is ShardsOfStack else dict(held)
        self._size, self._stride = value._size, value._stride

    # ---- looking at values
    def reconcile(self) -> Tensor:
        """One ordinary tensor: a detached copy of the shard that all ranks have in common.

        In compiled code the shards are compared each time it runs, and the copy never requires
        grad.

        Raises:
            RankDivergence: the shards differ.
        """
        if tracing_active():
            return reconcile_when_run(self._local_tensors)
        require_equal(self._local_tensors, "reconcile()")
        result = next(iter(self._local_tensors.values())).detach().clone()
        return result.requires_grad_(self.requires_grad)

    def numpy(self, *, force: bool = False) -> Any:
        """The numpy array of the shard that all ranks share. Raises RankDivergence as reconcile."""
        require_equal(self._local_tensors, "numpy()")
        return self.reconcile().numpy(force=force)

    def tolist(self) -> Any:
        """The value as (nested) Python lists; numbers that differ per rank as per-rank SymInts.

        Raises:
            RankDivergence: the shards differ in shape, or in values that are not integers.
        """
        shards = self._local_tensors
        first = next(iter(shards.values()))
        # Values are not known while a program is traced: then every rank has numbers of its own.
        traced = tracing_active()
        if all(t is first or (not traced and same_values(first, t)) for t in shards.values()):
            return first.tolist()
        integral = not (
            first.is_floating_point() or first.is_complex() or first.dtype == torch.bool
        )
        if integral and all(t.shape == first.shape for t in shards.values()):
            return _zip_lists({r: t.tolist() for r, t in shards.items()})
        require_equal(shards, "tolist()")
        raise AssertionError("unreachable")  # the shards differ, so the line above raises

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        """Whether the shards of all ranks are contiguous."""
        if type(self._local_tensors) is ShardsOfStack:
            return Tensor.is_contiguous(self, memory_format=memory_format)
        return all(
            t.is_contiguous(memory_format=memory_format) for t in self._local_tensors.values()
        )

    @property
    def nbytes(self) -> int:
        """A number per rank where the shards' sizes differ; torch's C++ asks for one."""
        return self.numel() * self.element_size()

    @own_frame_never_compiled  # where a compiled module's hook, which Dynamo skips, calls it
    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """Itself where all shards are contiguous, else a copy on every rank."""
        if self.is_contiguous(memory_format=memory_format):
            return self
        return self.clone(memory_format=memory_format)

    # These read memory that the wrapper does not have, below any dispatch.
    def apply_(self, callable: Callable[..., Any]) -> LocalTensor:
        """Apply a Python function to every element of every shard, in place."""
        for t in self._local_tensors.values():
            t.apply_(callable)
        return self

    def map_(self, tensor: Tensor, callable: Callable[..., Any]) -> LocalTensor:
        """Write callable(own element, element of `tensor`) into every element of every shard."""
        for rank, t in self._local_tensors.items():
            other = tensor._local_tensors[rank] if isinstance(tensor, LocalTensor) else tensor
            t.map_(other, callable)
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:
        shards = ",\n".join(f"  {r}: {t}" for r, t in self._local_tensors.items())
        grad = ""
        if self.requires_grad:
            grad = (
                f", grad_fn=<{type(self.grad_fn).__name__}>"
                if self.grad_fn
                else ", requires_grad=True"
            )
        return f"LocalTensor(\n{shards}{grad}\n)"

    # ---- copying and saving
    def __deepcopy__(self, memo: dict[int, Any]) -> LocalTensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user (graph leaves) support the deepcopy "
                "protocol at the moment. Detach the LocalTensor first."
            )
        held = self._local_tensors
        if type(held) is ShardsOfStack:
            result = _wrap_stacked(copy.deepcopy(held.stack, memo), held.ranks, self.requires_grad)
        else:
            shards = {r: copy.deepcopy(t, memo) for r, t in held.items()}
            result = _wrap(shards, self.requires_grad)
        memo[id(self)] = result
        if self.grad is not None:
            result.grad = copy.deepcopy(self.grad, memo)
        for name, value in self.__dict__.items():
            if name not in _OWN_ATTRIBUTES:
                result.__dict__[name] = copy.deepcopy(value, memo)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        extra = {k: v for k, v in self.__dict__.items() if k not in _OWN_ATTRIBUTES}
        held = self._local_tensors
        if type(held) is ShardsOfStack:
            values = (held.stack, held.ranks, self.requires_grad, extra, held.shift)
            return _rebuild_stacked, values
        return _rebuild, (dict(held), self.requires_grad, extra)

    def _sync_meta(self) -> None:
        """Take size, stride and offset from the shards again, after an op changed them in place."""
        fresh = _wrap(self._local_tensors)
        with torch._C._DisableTorchDispatch():
            torch._C.TensorBase.data.__set__(self, fresh)
        self._size, self._stride = fresh._size, fresh._stride


def _shard_property(rank: int) -> property:
    def shard(self: LocalTensor) -> Tensor:
        try:
            return self._local_tensors[rank]
        except KeyError:
            raise AttributeError(
                f"this LocalTensor holds no shard of rank {rank}, only of ranks "
                f"{list(self._local_tensors)}"
            ) from None

    def replace(self: LocalTensor, value: Tensor) -> None:
        shards: Any = self._local_tensors
        shards[rank] = value

    return property(shard, replace, doc=f"The shard of rank {rank}. AOTAutograd replaces it.")


def _define_rank(rank: int) -> None:
    """Give LocalTensor the attribute `_local_tensor_{rank}`, which flattening names.

    A property, not __getattr__: Dynamo reads no attribute, `.grad` included, of a class with that.
    """
    if f"{_PREFIX}{rank}" not in LocalTensor.__dict__:
        setattr(LocalTensor, f"{_PREFIX}{rank}", _shard_property(rank))


for _rank in range(64):
    _define_rank(_rank)

_OWN_ATTRIBUTES = ("_local_tensors", "_ranks", "_size", "_stride")


def _rebuild(shards: dict[int, Tensor], requires_grad: bool, extra: dict[str, Any]) -> LocalTensor:
    result = _wrap(_checked_shards(shards), requires_grad)
    result.__dict__.update(extra)
    return result


def _rebuild_stacked(
    stack: Tensor,
    ranks: tuple[int, ...],
    requires_grad: bool,
    extra: dict[str, Any],
    shift: int = 0,
) -> LocalTensor:
    result = _wrap_stacked(stack, ranks, requires_grad, shift)
    result.__dict__.update(extra)
    return result


def _defer(func: Any, types: tuple[type, ...], args: Any, kwargs: Any) -> Any:
    """Give the other tensor subclass in the call its turn, and explain when it takes none."""
    for other in types:
        if other is LocalTensor or other in SHARD_TYPES:
            continue
        result = other.__torch_dispatch__(func, types, args, kwargs)  # type: ignore[attr-defined]
        if result is not NotImplemented:
            return result
    names = sorted({t.__name__ for t in types if t is not LocalTensor and t not in SHARD_TYPES})
    raise UnsupportedError(
        f"{func} got a LocalTensor together with {', '.join(names)}, and neither knows the other. "
        f"Make a LocalTensor of plain tensors and put it inside {names[0]}, or convert "
        f"the {names[0]} to a plain tensor first."
    )


def _checked_shards(local_tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Rank -> shard in rank order, after every check that ops on good shards need not repeat."""
    shards = checked(local_tensors)
    for rank in shards:
        if rank >= 64:
            _define_rank(rank)
    return shards


def _wrap(shards: Mapping[int, Tensor], requires_grad: bool = False) -> LocalTensor:
    """A LocalTensor of shards that are known to be plain tensors, in rank order.

    Raises:
        ShardError: the shards disagree in dtype, device, layout, dimensions or conj/neg bit.
    """
    if type(shards) is ShardsOfStack:
        return _wrap_stacked(shards.stack, shards.ranks, requires_grad, shards.shift)
    it = iter(shards.values())
    first = next(it)
    dtype, device, layout, keys = first.dtype, first.device, first.layout, extra_keys(first)
    if type(first) is Tensor:
        shape, stride, offset = first.shape, first.stride(), first.storage_offset()
        even = True
        for t in it:
            if t.dtype is not dtype or t.device != device or t.layout is not layout:
                raise disagreement(shards)
            if t.is_neg() or t.is_conj() or keys is not NO_KEYS:
                if extra_keys(t) != keys:
                    raise disagreement(shards)
            if t.shape != shape or t.stride() != stride or t.storage_offset() != offset:
                even = False
    else:
        even = False
        for t in it:
            if t.dtype is not dtype or t.device != device or t.layout is not layout:
                raise disagreement(shards)
            if extra_keys(t) != keys:
                raise disagreement(shards)
    if not even:
        traced = isinstance(first, (FakeTensor, FunctionalTensor))
        ndim = first.dim()
        if any(t.dim() != ndim for t in shards.values()):
            raise disagreement(shards)
        items = shards.items()
        shape = tuple(make_int({r: t.shape[d] for r, t in items}, traced) for d in range(ndim))
        strides = {r: t.stride() for r, t in items}
        stride = tuple(make_int({r: s[d] for r, s in strides.items()}, traced) for d in range(ndim))
        offset = make_int({r: t.storage_offset() for r, t in items}, traced)
        if not sizes_differ.ever and any(map(is_ranked, (*shape, *stride))):
            sizes_differ.ever = True
    result = Tensor._make_wrapper_subclass(
        LocalTensor,
        shape,
        strides=stride,
        storage_offset=offset,
        dtype=dtype,
        device=device,
        layout=layout,
        requires_grad=requires_grad,
        _extra_dispatch_keys=keys,
    )
    result._local_tensors = shards
    result._ranks = frozenset(shards)
    result._size = shape
    result._stride = stride
    return result


def _wrap_stacked(
    stack: Tensor, ranks: tuple[int, ...], requires_grad: bool = False, shift: int = 0
) -> LocalTensor:
    """A LocalTensor of a stack [ranks, *local], a plain tensor whose rows are the shards.

    The wrapper has the storage offset of the first rank's shard, which counts for all ranks: the
    shards of the others lie a stride further each. With a `shift` each rank has an offset of its
    own (see ShardsOfStack).
    """
    shape, stride = stack.shape[1:], stack.stride()[1:]
    offset: Any = stack.storage_offset()
    if shift:
        offset = make_int({r: offset + i * shift for i, r in enumerate(ranks)}, tracing_active())
    result = Tensor._make_wrapper_subclass(
        LocalTensor,
        shape,
        strides=stride,
        storage_offset=offset,
        dtype=stack.dtype,
        device=stack.device,
        layout=stack.layout,
        requires_grad=requires_grad,
        _extra_dispatch_keys=extra_keys(stack),
    )
    result._local_tensors = ShardsOfStack(stack, ranks, shift)
    result._ranks = rank_set(ranks)
    result._size = shape
    result._stride = stride
    return result


def _wrap_fresh(shards: dict[int, Tensor], ranks: frozenset[int]) -> LocalTensor:
    """`_wrap` for results of one op that makes fresh tensors, run on shards that agree.

    Such results agree in dtype and device, are not offset and carry no conj/neg bit. They are
    strided: others have no stride() to ask for.
    """
    it = iter(shards.values())
    first = next(it)
    if type(first) is not Tensor:
        return _wrap(shards)
    shape, stride = first.shape, first.stride()
    for t in it:
        if t.shape != shape or t.stride() != stride:
            return _wrap(shards)
    if first.is_neg() or first.is_conj() or first.storage_offset():
        return _wrap(shards)
    result = Tensor._make_wrapper_subclass(
        LocalTensor,
        shape,
        strides=stride,
        dtype=first.dtype,
        device=first.device,
    )
    result._local_tensors = shards
    result._ranks = ranks
    result._size = shape
    result._stride = stride
    return result


def _zip_lists(lists: dict[int, Any]) -> Any:
    first = next(iter(lists.values()))
    if isinstance(first, list):
        return [_zip_lists({r: v[i] for r, v in lists.items()}) for i in range(len(first))]
    return make_int(lists)


torch.serialization.add_safe_globals([LocalTensor, _rebuild, _rebuild_stacked])
