"""Programs that go wrong without something, by the name of what they need."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

CACHEABLE = "torch._inductor.config.unsafe_marked_cacheable_functions"


class Witnesses(dict[str, Callable[[], None]]):
    """name -> witness: returns where the name is replaced, raises where it is not."""

    def needs(self, *names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """Decorator: the function is the witness of each of `names`."""

        def register(witness: Callable[[], None]) -> Callable[[], None]:
            for name in names:
                assert name not in self, name
                self[name] = witness
            return witness

        return register

    def needs_each(self, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Decorator: one witness(name) for each of `names`."""

        def register(witness: Callable[..., None]) -> Callable[..., None]:
            for name in names:
                self.needs(name)(lambda name=name: witness(name))
            return witness

        return register


def require_cacheable(name: str) -> None:
    """AOTAutograd may cache a graph with the function of an entry f"{CACHEABLE}[...]"."""
    from torch._functorch._aot_autograd.autograd_cache import check_node_safe

    module, _, function = name.removeprefix(f"{CACHEABLE}[").removesuffix("]").rpartition(".")
    graph = torch.fx.Graph()
    check_node_safe(graph.call_function(getattr(importlib.import_module(module), function)))
