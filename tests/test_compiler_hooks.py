"""What torch's compiler is taught when the package is imported: needed, and undone.

(What a mode replaces is in test_torch_hooks.py.)
"""

from __future__ import annotations

import contextlib
import operator

import pytest
import torch
from torch import SymInt
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from localtensor_compile import LocalIntNode
from localtensor_compile.compile import dynamo_support, plain_operands
from localtensor_compile.compile.dynamo_support import _BINARY, _LAYOUT
from localtensor_compile.values.rank_node import LocalNode
from tests.compiler_witnesses import QUESTIONS, WITNESSES
from tests.witnesses import CACHEABLE

PLAIN_OPERANDS = "Tensor._wrapped_number"


def name_of(owner, key):
    """What a replacement is called here; entries of the three tables by type, function and name."""
    if not isinstance(owner, dict):
        return f"{owner.__name__}.{key}"
    if isinstance(key, str):
        return f"{CACHEABLE}[{key}]"
    if isinstance(key, type):
        return f"SourcelessBuilder._type_handlers[{key.__name__}]"
    return f"{QUESTIONS}[{key.__module__}.{key.__name__}]"


@contextlib.contextmanager
def all_but(name, monkeypatch):
    """Within it, torch's compiler is taught everything but one thing."""
    put = dynamo_support._set
    left_out = []

    def some(owner, attribute, value):
        if name_of(owner, attribute) == name:
            left_out.append(name)
        else:
            put(owner, attribute, value)

    dynamo_support.unregister()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(dynamo_support, "_set", some)
            if name == PLAIN_OPERANDS:
                left_out.append(name)
                patch.setattr(plain_operands, "register", lambda: lambda: None)
            dynamo_support.register()
        assert left_out, f"{name} is not replaced"
        yield
    finally:
        dynamo_support.unregister()
        dynamo_support.register()


def test_undone(monkeypatch):
    touched = []
    put = dynamo_support._set

    def spy(owner, attribute, value):
        here = owner if isinstance(owner, dict) else owner.__dict__
        touched.append((here, attribute, here.get(attribute)))
        put(owner, attribute, value)

    dynamo_support.unregister()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(dynamo_support, "_set", spy)
            dynamo_support.register()
        replaced = [(h, a, b) for h, a, b in touched if h.get(a) is not b]
        assert len(replaced) > 60
        dynamo_support.unregister()
        # In reverse: some names are replaced twice.
        for here, attribute, before in {
            (id(h), str(a)): (h, a, b) for h, a, b in touched[::-1]
        }.values():
            assert here.get(attribute) is before, attribute
    finally:
        dynamo_support.register()


# ---------------------------------------------------------------- a plain symbol and a rank number
def symbol(value):
    env = ShapeEnv()
    return env.create_unspecified_symint_and_symbol(value, ConstantSource("s"), DimDynamic.DYNAMIC)


PYTHON = {
    "int_floordiv": operator.floordiv, "floordiv": operator.floordiv, "and_": operator.and_,
    "or_": operator.or_, "sym_and": operator.and_, "sym_or": operator.or_,
    "pow_by_natural": operator.pow, "sym_max": max, "sym_min": min,
    "bitwise_and": operator.and_, "bitwise_or": operator.or_, "bitwise_xor": operator.xor,
    "int_truediv": operator.truediv, "float_truediv": operator.truediv,
    "float_pow": operator.pow,
}  # fmt: skip
BOOLS = {"and_", "or_", "sym_and", "sym_or"}
FLOATS = {"float_truediv", "float_pow"}


def operands(name):
    """A symbol, {rank: number}, and both as Python numbers."""
    left, ranks = symbol(5), SymInt(LocalIntNode({0: 2, 1: 3}))
    if name in BOOLS:
        return left > 7, ranks > 2, False, {0: False, 1: True}
    if name in FLOATS:
        return torch.sym_float(left), torch.sym_float(ranks), 5.0, {0: 2.0, 1: 3.0}
    return left, ranks, 5, {0: 2, 1: 3}


def arithmetic(name):
    left, ranks, plain, values = operands(name)
    result = getattr(left.node, name)(ranks.node)
    assert isinstance(result, LocalNode)
    function = PYTHON.get(name) or getattr(operator, name)
    found = {r: getattr(getattr(v, "node", None), "hint", v) for r, v in result._values.items()}
    assert found == {r: function(plain, v) for r, v in values.items()}


ARITHMETIC = [name for name in _BINARY if name in SymNode.__dict__]


@pytest.mark.parametrize("name", ("floordiv", "pow", "truediv", "sym_and", "sym_or"))
def test_arithmetic_that_calls_other(name):
    arithmetic(name)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_needed(name, monkeypatch):
    arithmetic(name)
    with all_but(f"SymNode.{name}", monkeypatch), pytest.raises(Exception):  # noqa: B017
        arithmetic(name)
    arithmetic(name)


def layout(name):
    left, ranks = symbol(5), SymInt(LocalIntNode({0: 2, 1: 3}))
    sizes = [left.node, ranks.node, left.node, left.node, left.node]
    dims = 5 if "3d" in name else 4 if "2d" in name else 2
    result = getattr(left.node, name)(sizes[:dims], sizes[:dims][::-1])
    assert isinstance(result, LocalNode)


@pytest.mark.parametrize("name", [name for name in _LAYOUT if name in SymNode.__dict__])
def test_layout_is_needed(name, monkeypatch):
    layout(name)
    with all_but(f"SymNode.{name}", monkeypatch), pytest.raises(Exception):  # noqa: B017
        layout(name)


# ---------------------------------------------------------------- everything else
def run(witness):
    torch._dynamo.reset()
    with torch.random.fork_rng():
        witness()


def installed_names(monkeypatch):
    names = [PLAIN_OPERANDS]
    with monkeypatch.context() as patch:
        dynamo_support.unregister()
        patch.setattr(
            dynamo_support, "_set", lambda owner, key, _: names.append(name_of(owner, key))
        )
        patch.setattr(plain_operands, "register", lambda: lambda: None)
        dynamo_support.register()
        dynamo_support.unregister()
    dynamo_support.register()
    return {name for name in names if not name.startswith("SymNode.")}


# Replaced in other versions of torch only, and without a witness.
ELSEWHERE = {
    "ConstantVariable.create": "before 2.13",
    "torch._functorch._aot_autograd.subclass_utils._find_attr_matching_outer_metadata": "2.14",
}


def test_every_replacement_has_a_witness(monkeypatch):
    installed = installed_names(monkeypatch)
    assert installed - ELSEWHERE.keys() == WITNESSES.keys()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", sorted(WITNESSES))
def test_needed(name, monkeypatch):
    run(WITNESSES[name])
    # Also where an error that the witness expects is not raised.
    with all_but(name, monkeypatch), pytest.raises((Exception, pytest.fail.Exception)):
        run(WITNESSES[name])
    run(WITNESSES[name])
