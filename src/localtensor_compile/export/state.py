"""Parameters and buffers of all ranks as modules of plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .leaves import Leaf, take_apart


@dataclass(frozen=True)
class State:
    """A parameter or buffer of a model.

    Attributes:
        name: where it is in the model.
        leaf: its parts.
        parameter: whether it is a parameter.
        requires_grad: of a parameter.
        persistent: whether it is part of the state dict.
        memory: where the parts were in the model, as (storage, first byte, end).
    """

    name: str
    leaf: Leaf
    parameter: bool
    requires_grad: bool
    persistent: bool
    memory: frozenset[tuple[int, int, int]]

    def name_of(self, rank: int | None) -> str:
        """Its name in the program of all ranks: `weight.rank0` of `weight`."""
        return self.name if rank is None else f"{self.name}.rank{rank}"

    def shares_memory_with(self, other: State) -> bool:
        """Whether a part of it and one of `other` were in the same memory."""
        return any(
            a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a in self.memory for b in other.memory
        )


def states_of(model: nn.Module) -> list[State]:
    """All parameters and buffers, tied ones once."""
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    found = []
    for name, p in model.named_parameters():
        leaf = take_apart(p.data if type(p) is nn.Parameter else p)
        found.append(State(name, leaf, True, p.requires_grad, True, _memory(leaf)))
    for name, buffer in model.named_buffers():
        leaf = take_apart(buffer)
        persistent = name not in transient
        found.append(State(name, _copied(leaf), False, False, persistent, _memory(leaf)))
    return found


def _memory(leaf: Leaf) -> frozenset[tuple[int, int, int]]:
    found = set()
    for part in leaf.parts:
        if part.numel():
            last = sum((size - 1) * step for size, step in zip(part.shape, part.stride()))
            start = part.storage_offset() * part.element_size()
            end = start + (last + 1) * part.element_size()
            found.add((part.untyped_storage()._cdata, start, end))
    return frozenset(found)


def _copied(leaf: Leaf) -> Leaf:
    """As it is now: the model may go on."""
    return replace(leaf, parts=tuple(part.detach().clone() for part in leaf.parts))


def tensors_of(state: State) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each part, as the program of all ranks holds it."""
    for rank, part in zip(state.leaf.ranks or (None,), state.leaf.parts):
        yield state.name_of(rank), part


def register(root: nn.Module, name: str, tensor: Tensor, like: State) -> None:
    """Put `tensor` at `name` of `root`, as a parameter or buffer as `like` is."""
    owner, attribute = _owner(root, name)
    tensor = with_own_memory(tensor.detach())
    if like.parameter:
        owner.register_parameter(attribute, nn.Parameter(tensor, like.requires_grad))
    else:
        owner.register_buffer(attribute, tensor.clone(), like.persistent)


def with_own_memory(tensor: Tensor) -> Tensor:
    """`tensor`, copied where it is part of something larger: that would be saved with it."""
    memory = tensor.numel() * tensor.element_size()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == memory
    return tensor if whole and memory else tensor.clone()


def read(root: nn.Module, name: str) -> Any:
    """What is at `name` of `root`."""
    value: Any = root
    for attribute in name.split("."):
        value = getattr(value, attribute)
    return value


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the last part of `name`; modules on the way are made."""
    *path, attribute = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    return module, attribute
