"""Random aten ops on LocalTensors: every rank draws what its own process would draw.

In eager each rank's call gets that rank's generator. While a graph is traced one
localtensor_random node stands for all ranks' draws (random_nodes.py). Which ops are random is read
from torch's own tag.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._torch import tracing_active
from ..errors import UnsupportedError
from ..values.op_table import Handler, add_rule, handler_of
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor, _wrap
from .draws import Draw, traced_generator_error
from .generators import is_default
from .per_rank import OpPlan, run_per_rank
from .random_factories import RANDOM_FACTORIES as RANDOM_FACTORIES
from .random_factories import random_factory as random_factory
from .random_nodes import NODES
from .stacked_nodes import stacked_draws, stacked_fill
from .whole_draws import active, draw_pieces

aten = torch.ops.aten

# Tagged as random by torch, but they draw nothing: they choose a kernel or replay a known state.
_DRAWS_NOTHING = {
    "aten::_fused_sdp_choice",
    "aten::_nested_tensor_softmax_with_shape",
    "aten::_cudnn_attention_backward",
    "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_fill_mem_eff_dropout_mask_",
    "aten::_flash_attention_forward_no_dropout_inplace",
}
# They keep their dropout state in a cache of the process or in a tensor that was drawn once.
_SHARED_STATE = {
    "aten::_cudnn_rnn",
    "aten::_cudnn_init_dropout_state",
    "aten::miopen_rnn",
    "aten::_lstm_mps",
}
# They call those on devices other than the CPU.
_RECURRENT = {"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"}


class RandomOp:
    """The handler of one random aten overload."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.draw = Draw(func)
        self.plan = OpPlan(func)
        self.as_is = OpPlan(func)
        self.plan.call = SimpleNamespace(_op=self.draw.call)
        arguments = func._schema.arguments
        self.arguments = arguments
        self.generator_at = next(
            (i for i, a in enumerate(arguments) if "Generator" in str(a.type)), None
        )
        self.outs = tuple(a.name for a in arguments if a.is_out)
        self.switches = tuple(
            (i, a.name, a.default_value if a.has_default_value() else None, _SWITCHES[a.name])
            for i, a in enumerate(arguments)
            if a.name in _SWITCHES
        )
        self._traced: Callable[[tuple[int, ...], Mapping[str, Any]], Any] | None = None

    def __call__(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for i, name, default, off in self.switches:
            if (args[i] if i < len(args) else kwargs.get(name, default)) in off:
                return run_per_rank(self.as_is, args, kwargs)
        local = _first_local(args, kwargs)
        name = self.func._schema.name
        if name in _SHARED_STATE or (name in _RECURRENT and local.device.type != "cpu"):
            raise UnsupportedError(
                f"{self.func} draws its dropout from a state that the whole process shares, so "
                "that ranks cannot draw their own. Use dropout=0 here and nn.Dropout between the "
                "layers."
            )
        args, kwargs, generator = self._split_generator(args, kwargs)
        whole = active()
        if whole is not None:
            return draw_pieces(whole, self.func, self._values(args, kwargs))
        shards = local._local_tensors
        if type(next(iter(shards.values()))) is not Tensor or tracing_active():
            if generator is not None:
                raise traced_generator_error(str(self.func))
            return self._run_traced(tuple(shards), args, kwargs)
        device = kwargs.get("device") or local.device
        turns = None if generator is not None else self.draw.direct(shards, device)
        if turns is not None:
            result = run_per_rank(self.plan, args, kwargs, ((self.draw.keyword, turns),))
        else:
            with self.draw.turns(shards, device, generator) as turns:
                result = run_per_rank(self.plan, args, kwargs, ((self.draw.keyword, turns),))
        for out in self.outs:
            kwargs[out]._sync_meta()  # the op resizes the shards
        return result

    def _split_generator(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        at = self.generator_at
        if at is None:
            return args, kwargs, None
        if at < len(args):
            generator = args[at]
            args = args[:at] + args[at + 1 :]
        elif "generator" in kwargs:
            generator = kwargs["generator"]
            kwargs = {k: v for k, v in kwargs.items() if k != "generator"}
        else:
            return args, kwargs, None
        if generator is not None and is_default(generator):
            generator = None  # what torch.manual_seed returns: each rank's own
        return args, kwargs, generator

    def _values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every argument but the generator, by name."""
        values: dict[str, Any] = {}
        for i, a in enumerate(a for a in self.arguments if "Generator" not in str(a.type)):
            default = a.default_value if a.has_default_value() else None
            values[a.name] = args[i] if i < len(args) else kwargs.get(a.name, default)
        return values

    # ---- while a graph is traced
    def _run_traced(
        self, ranks: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        values = self._values(args, kwargs)
        if self._traced is None:
            self._traced = _traced_form(self.func)
        return self._traced(ranks, values)


_OFF = (0, 0.0)
_SWITCHES: dict[str, tuple[Any, ...]] = {
    # argument -> the values with which an op draws nothing
    "dropout_p": _OFF,
    "dropout": _OFF,
    "train": (False,),
    "training": (False,),
}


def _first_local(args: tuple[Any, ...], kwargs: dict[str, Any]) -> LocalTensor:
    if args and isinstance(args[0], LocalTensor):
        return args[0]
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, LocalTensor):
            return leaf
    raise UnsupportedError(
        "a random op got numbers that differ per rank, but no LocalTensor. Call it inside "
        "LocalTensorMode."
    )


Values = Mapping[str, Any]
Traced = Callable[[tuple[int, ...], Values], Any]


def _traced_form(func: Any) -> Traced:
    """How `func` is recorded, decided once per overload.

    Raises:
        UnsupportedError: an op that cannot be drawn per rank inside a graph.
    """
    special = _SPECIAL.get(func)
    if special is not None:
        return special
    if func in NODES:
        return _fill(func) if NODES[func].fills else _functional(func)
    if any(a.is_out for a in func._schema.arguments):
        return _out(func)
    if func._schema.name in _LIKE:
        return _like(func)
    inplace = _inplace_twin(func)
    if inplace is not None:
        return _functional_form(inplace)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return lambda ranks, values: func.decompose(*_called(func, values)[0])
    raise UnsupportedError(
        f"{func} cannot draw per rank inside a compiled or traced function. Draw outside of it, or "
        "with an op that can: torch.rand, randn, randint, randperm, normal, bernoulli, "
        "multinomial, poisson, dropout and their in-place forms."
    )


def _called(func: Any, values: Values) -> tuple[list[Any], dict[str, Any]]:
    arguments = [a for a in func._schema.arguments if "Generator" not in str(a.type)]
    named = {a.name: values[a.name] for a in arguments if a.kwarg_only}
    return [values[a.name] for a in arguments if not a.kwarg_only], named


def _fill(func: Any) -> Traced:
    """In place: draw into fresh memory of the same strides, then copy."""
    node = NODES[func]

    def traced(ranks: tuple[int, ...], values: Values) -> Any:
        target = values[func._schema.arguments[0].name]
        drawn = _drawn_like(node, target, ranks, values)
        if isinstance(drawn, ShardsOfStack):
            target._local_tensors.stack.copy_(drawn.stack)
            return target
        for shard, fresh in zip(target._local_tensors.values(), drawn):
            shard.copy_(fresh)
        return target

    return traced


def _functional_form(inplace: Any) -> Traced:
    """aten.uniform(x) and others that functionalization makes of in-place ops."""
    node = NODES[inplace]

    def traced(ranks: tuple[int, ...], values: Values) -> Any:
        template = aten.empty_like.default(values["self"])
        return _local(ranks, _drawn_like(node, template, ranks, values))

    return traced


def _drawn_like(node: Any, like: LocalTensor, ranks: tuple[int, ...], values: Values) -> Any:
    """A tensor per rank, or one stack of them."""
    stacked = stacked_fill(node, like, [values[a.name] for a in node.arguments])
    if stacked is not None:
        return stacked
    shards = like._local_tensors.values()
    return node.emit_fill(
        ranks,
        [t.shape for t in shards],
        [t.stride() for t in shards],
        like.dtype,
        like.device,
        [values[a.name] for a in node.arguments],
    )


def _functional(func: Any) -> Traced:
    node = NODES[func]

    def traced(ranks: tuple[int, ...], values: Values) -> Any:
        given = [values[a.name] for a in node.arguments]
        outputs = stacked_draws(node, ranks, given) or node.emit(ranks, given)
        results = [_local(ranks, tensors) for tensors in outputs]
        if node.outputs is None:
            return results[0] if len(results) == 1 else tuple(results)
        out, logsumexp, seed, offset, mask = results
        sizes = (values["query"].shape[-2], values["key"].shape[-2])
        return (out, logsumexp, None, None, *sizes, seed, offset, mask)

    return traced


def _refuse_bound_in_tensor(func: Any) -> None:
    if any(a.name == "high" and str(a.type) == "Tensor" for a in func._schema.arguments):
        raise UnsupportedError(
            f"{func} takes its bound from a tensor, which a compiled or traced function cannot "
            "read. Pass the bound as a number."
        )


_LIKE = {"aten::rand_like", "aten::randn_like", "aten::randint_like"}


def _like(func: Any) -> Traced:
    """rand_like and others: what torch does, empty_like and an in-place draw."""
    _refuse_bound_in_tensor(func)
    fill, of_values = _FACTORIES[func._schema.name.removesuffix("_like")]
    node = NODES[fill]

    def traced(ranks: tuple[int, ...], values: Values) -> Any:
        options = {name: values[name] for name in ("dtype", "layout", "device", "memory_format")}
        template = aten.empty_like.default(values["self"], **options)
        names = [a.name for a in node.arguments]
        drawn = _drawn_like(node, template, ranks, dict(zip(names, of_values(values))))
        return _local(ranks, drawn)

    return traced


def _out(func: Any) -> Traced:
    """out=: the functional overload, then a copy."""
    outs = [a.name for a in func._schema.arguments if a.is_out]
    wanted = [
        (a.name, str(a.type))
        for a in func._schema.arguments
        if not a.is_out and "Generator" not in str(a.type)
    ]
    functional = _overload_taking(func.overloadpacket, wanted)
    if func._schema.name.removesuffix("_like") in _FACTORIES:
        return _filled(func)
    if functional is None or not any(kind == "Tensor" for _, kind in wanted):
        raise UnsupportedError(
            f"{func} cannot draw per rank inside a compiled or traced function. Use the form "
            "without out=, or fill the tensor in place with uniform_, normal_ or random_."
        )

    def traced(ranks: tuple[int, ...], values: Values) -> Any:
        args, kwargs = _called(functional, values)
        results = handler_of(functional)(functional, tuple(args), kwargs)
        results = results if isinstance(results, tuple) else (results,)
        for name, result in zip(outs, results):
            if tuple(values[name].shape) != tuple(result.shape):
                aten.resize_.default(values[name], result.shape)
            aten.copy_.default(values[name], result)
        return values[outs[0]] if len(outs) == 1 else tuple(values[name] for name in outs)

    return traced


# Factory -> the op that fills its result, and that op's arguments.
_FACTORIES: dict[str, tuple[Any, Callable[[Values], tuple[Any, ...]]]] = {
    "aten::rand": (aten.uniform_.default, lambda v: (0.0, 1.0)),
    "aten::randn": (aten.normal_.default, lambda v: (0.0, 1.0)),
    "aten::randint": (getattr(aten.random_, "from"), lambda v: (v.get("low", 0), v["high"])),
}


def _filled(func: Any) -> Traced:
    """torch.rand(size, out=...), torch.rand_like(x, out=...): fill `out` in place."""
    _refuse_bound_in_tensor(func)
    fill, arguments = _FACTORIES[func._schema.name.removesuffix("_like")]

    def traced(ranks: tuple[int, ...], values: Values) -> Any:
        out = values["out"]
        size = values["size"] if "size" in values else values["self"].shape
        if tuple(out.shape) != tuple(size):
            aten.resize_.default(out, size)
        return handler_of(fill)(fill, (out, *arguments(values)), {})

    return traced


def _overload_taking(packet: Any, wanted: Sequence[tuple[str, str]]) -> Any:
    for name in packet.overloads():
        arguments = getattr(packet, name)._schema.arguments
        if wanted == [(a.name, str(a.type)) for a in arguments if "Generator" not in str(a.type)]:
            return getattr(packet, name)
    return None


def _inplace_twin(func: Any) -> Any:
    """aten::uniform_ of aten::uniform, aten::normal_ of aten::normal_functional, ..., or None."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_functional")
    packet = getattr(aten, f"{name}_", None)
    if packet is None:
        return None
    twin = _overload_taking(
        packet,
        [(a.name, str(a.type)) for a in func._schema.arguments if "Generator" not in str(a.type)],
    )
    return twin if twin in NODES else None


def _rrelu(ranks: tuple[int, ...], values: Values) -> Any:
    """rrelu_with_noise writes the slopes that it drew into `noise`."""
    out, noise = _functional(aten.rrelu_with_noise_functional.default)(ranks, values)
    aten.copy_.default(values["noise"], noise)
    return out


def _rrelu_inplace(ranks: tuple[int, ...], values: Values) -> Any:
    return aten.copy_.default(values["self"], _rrelu(ranks, values))


def _native_dropout(ranks: tuple[int, ...], values: Values) -> Any:
    """What F.dropout becomes in a graph. In eager F.dropout(p=1) draws nothing."""
    if values["p"] == 1:
        x = values["input"]
        return aten.mul.Tensor(x, 0.0), aten.zeros_like.default(x, dtype=torch.bool)
    return _functional(aten.native_dropout.default)(ranks, values)


_SPECIAL: dict[Any, Traced] = {
    aten.native_dropout.default: _native_dropout,
    aten.rrelu_with_noise.default: _rrelu,
    aten.rrelu_with_noise_.default: _rrelu_inplace,
}


def _local(ranks: tuple[int, ...], tensors: Any) -> LocalTensor:
    if isinstance(tensors, ShardsOfStack):
        return _wrap(tensors)
    return _wrap(dict(zip(ranks, tensors)))


def _random_rule(func: Any) -> Handler | None:
    if (
        isinstance(func, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in func.tags
        and func.namespace == "aten"
        and func._schema.name not in _DRAWS_NOTHING
    ):
        return RandomOp(func)
    return None


add_rule(_random_rule)
