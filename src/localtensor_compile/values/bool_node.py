"""LocalBoolNode: one bool per rank behind a `torch.SymBool`."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import SymBool

from ..errors import RankDivergence, per_rank_text
from . import broadcast, rank_node
from .rank_node import MAKERS, LocalNode, binary, unary, value_on_rank


class _RankShapeEnv:
    """The ShapeEnv entry points that guard_or_false/true and statically_known_true reach on a
    per-rank bool (symbolic_shapes.py). Ranks that disagree mean "cannot tell"."""

    def evaluate_sym_node(
        self,
        node: LocalBoolNode,
        size_oblivious: bool = False,
        fallback_value: Any = None,
        **_: Any,
    ) -> bool:
        flags = set(node._flags().values())
        if len(flags) == 1:
            return flags.pop()
        return node.bool_() if fallback_value is None else bool(fallback_value)

    def _maybe_evaluate_static(self, expr: Any, **_: Any) -> None:
        return None


class LocalBoolNode(LocalNode):
    """A bool per rank. `bool()` of it raises RankDivergence when the ranks disagree.

    `when_mixed` is what torch's own structural comparisons see when the ranks disagree: "are these
    sizes equal?" is no unless it is yes on every rank. It never answers user code.
    """

    pytype = bool
    shape_env = _RankShapeEnv()
    when_mixed: bool | None = None
    compared: tuple[Any, Any] | None = None  # the operands of == between ints

    def is_bool(self) -> bool:
        return True

    def maybe_as_bool(self) -> bool | None:
        return self._uniform()

    def constant_bool(self) -> bool | None:
        return self._uniform()

    def _flags(self) -> dict[int, bool]:
        return {r: bool(v) for r, v in self._values.items()}  # guards on each rank's symbol

    def guard_bool(self, file: str, line: int) -> bool:
        flags = self._flags()
        if len(set(flags.values())) == 1:
            return next(iter(flags.values()))
        if self.when_mixed is not None and (
            # C++ probes of layout and broadcasting: "not on all ranks" sends them down the general
            # path, or into a check that raises.
            (file and file.endswith((".cpp", ".h", ".c")))
            or _asked_by(_DTENSOR)
            or (not self._traced and _asked_by(_COMPILER_DIRS))
        ):
            return self.when_mixed
        raise RankDivergence(
            f"ranks disagree about a condition: {per_rank_text(flags)}. Each rank would take its "
            "own branch, and one program cannot take both. Compute the choice with torch.where, "
            "or run the branch once per rank with rank_map, tensor_map or "
            "@maybe_run_for_local_tensor."
        )

    def bool_(self) -> bool:
        return self.guard_bool("", 0)

    def _flags_or(self, default: bool) -> dict[int, bool]:
        """As `_flags`; `default` for what depends on data that a trace does not know."""
        from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

        guard = guard_or_true if default else guard_or_false
        return {r: guard(v) for r, v in self._values.items()}

    def expect_true(self, file: str, line: int) -> bool:
        # What depends on data becomes an assertion of the compiled code.
        flags = {
            r: v.node.expect_true(file, line) if isinstance(v, SymBool) else v
            for r, v in self._values.items()
        }
        if all(flags.values()):
            return True
        if not any(flags.values()):
            return False
        failing = [r for r, ok in flags.items() if not ok]
        raise RankDivergence(
            f"a size check of torch fails on ranks {failing} only and holds on the others. On real "
            "processes these ranks would raise here and the others go on. Give every rank "
            "sizes that pass."
        )

    def guard_size_oblivious(self, file: str, line: int) -> bool:
        return all(self._flags_or(False).values())

    def guard_or_false(self, file: str, line: int) -> bool:
        flags = self._flags_or(False)
        if self.compared is None:
            return all(flags.values())
        left, right = self.compared
        values = {r: value_on_rank(right, r) for r in flags}
        return broadcast.answer_equal(file, left._values, values, flags)

    def guard_or_true(self, file: str, line: int) -> bool:
        return any(self._flags_or(True).values())

    def statically_known_true(self, file: str, line: int) -> bool:
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(v) for v in self._values.values())

    sym_and = and_ = binary("bool", operator.and_)
    sym_or = or_ = binary("bool", operator.or_)
    sym_not = not_ = unary("bool", torch.sym_not)
    eq = binary("bool", operator.eq)
    ne = binary("bool", operator.ne)

    def sym_ite(self, then: Any, otherwise: Any) -> Any:
        values = {
            r: value_on_rank(then if flag else otherwise, r) for r, flag in self._flags().items()
        }
        return MAKERS["int" if then.is_int() else "float"](values, self._traced)


MAKERS["bool"] = LocalBoolNode


def make_bool(values: Mapping[int, Any], traced: bool = False) -> Any:
    """{rank: bool or SymBool} as one bool or SymBool."""
    first = next(iter(values.values()))
    if all(type(v) is bool and v == first for v in values.values()):
        return first
    return SymBool(LocalBoolNode(values, traced))


# The parts of torch that compare sizes structurally on real tensors, to build guards and keys.
_COMPILER_DIRS = tuple(
    os.path.join(os.path.dirname(torch.__file__), *part.split("/")) + os.sep
    for part in (
        "_dynamo", "_functorch", "_export", "_inductor", "_subclasses", "_library", "export", "fx",
    )
)  # fmt: skip
# The parts of DTensor that ask whether two layouts, each possibly one per rank, are the same.
_DTENSOR = tuple(
    os.path.join(os.path.dirname(torch.__file__), "distributed", "tensor", name)
    for name in ("_api.py", "_dtensor_spec.py")
)
_OWN_FILES = (
    __file__,
    rank_node.__file__,
    os.path.join(os.path.dirname(__file__), "int_node.py"),
    os.path.join(os.path.dirname(__file__), "float_node.py"),
    os.path.join(os.path.dirname(torch.__file__), "__init__.py"),
)


def _asked_by(files: tuple[str, ...]) -> bool:
    """Whether code in these files of torch wants the bool (looked at only on disagreement)."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in _OWN_FILES:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.startswith(files)
