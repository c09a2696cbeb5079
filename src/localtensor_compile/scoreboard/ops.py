"""torch's OpInfo database: which ops, which dtype, which sample inputs.

The database is torch's own test code. Importing it takes seconds, so that only functions do.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# The sizes that the database's sample functions read when they are called. Even ones
# are divided by 2, and by 4 but for XS; of the uneven ones, 5 and 3 leave one of 4 ranks nothing.
SIZES: dict[str, dict[str, int]] = {
    "even": {"L": 16, "M": 8, "S": 4, "XS": 2},
    "uneven": {"L": 9, "M": 7, "S": 5, "XS": 3},
}
# One dtype per op: the first of these that it supports on CPU.
DTYPES = (torch.float32, torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16)
# Memory that nobody has written: nothing about the values can be compared.
_UNINITIALISED = frozenset({"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty"})
_UNINITIALISED |= {"new_empty_strided"}
DATABASE = "torch.testing._internal.common_methods_invocations"
_SEARCHED = 60  # samples looked at per op and set of sizes


@dataclass(frozen=True)
class Sample:
    """One call of an op: the arguments, and the tensors among them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @functools.cached_property
    def tensors(self) -> list[Tensor]:
        """The tensor arguments, in pytree order."""
        return [x for x in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def replaced(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors."""
        left = iter(tensors)
        new: Any = pytree.tree_map(
            lambda x: next(left) if isinstance(x, Tensor) else x, (self.args, self.kwargs)
        )
        return new


@functools.cache
def database() -> dict[str, Any]:
    """`name` or `name.variant` -> torch's OpInfo, in torch's order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    found = {}
    for op in op_db:
        found[f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name] = op
    return found


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype that an op is measured with."""
    supported = database()[name].dtypes
    return next((d for d in DTYPES if d in supported), None)


def is_uninitialised(name: str) -> bool:
    """Whether the op returns memory as it finds it."""
    return database()[name].name in _UNINITIALISED


@functools.lru_cache(maxsize=64)
def samples(name: str, sizes: str, count: int) -> tuple[Sample, ...]:
    """The first `count` samples of an op that differ in kind, the same in every process.

    Two samples are of one kind if their tensors have the same numbers of dimensions and the
    same keyword arguments are given.
    """
    op, dtype = database()[name], dtype_of(name)
    if dtype is None:
        return ()
    kinds: dict[Any, Sample] = {}
    with _sizes(SIZES[sizes]), _seeded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grad = op.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
        for index, given in enumerate(op.sample_inputs("cpu", dtype, requires_grad=grad)):
            sample = Sample((given.input, *given.args), dict(given.kwargs))
            if all(_is_plain(t) for t in sample.tensors):
                kinds.setdefault(_kind(sample), sample)
            if index + 1 == _SEARCHED:
                break
    # Samples in which something can be sharded come first.
    best = sorted(kinds.values(), key=lambda s: not any(t.numel() > 1 for t in s.tensors))
    return tuple(best[:count])


def _kind(sample: Sample) -> Any:
    described = tuple((t.ndim, t.numel() == 0) for t in sample.tensors[:4])
    return described, tuple(sorted(sample.kwargs))


def _is_plain(tensor: Tensor) -> bool:
    """Strided and whole, which DTensor can distribute."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


@contextlib.contextmanager
def unseeded() -> Iterator[None]:
    """Take out the wrapper that seeds random ops of the database: Dynamo cannot trace it."""
    module: Any = importlib.import_module(DATABASE)
    wrapper = module.wrapper_set_seed
    module.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    try:
        yield
    finally:
        module.wrapper_set_seed = wrapper


@contextlib.contextmanager
def _sizes(values: dict[str, int]) -> Iterator[None]:
    """torch's sample functions read L, M, S and XS as globals of the modules they stand in."""
    database()
    modules = [
        m
        for n, m in list(sys.modules.items())
        if n.startswith(("torch.testing._internal.opinfo", DATABASE))
    ]
    before = [
        (m, name, m.__dict__[name])
        for m in modules
        for name in values
        if isinstance(m.__dict__.get(name), int)
    ]
    try:
        for module, name, _ in before:
            setattr(module, name, values[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextlib.contextmanager
def _seeded(seed: int = 0) -> Iterator[None]:
    """Every generator that sample functions draw from, put back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
