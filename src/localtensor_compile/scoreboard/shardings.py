"""Which shardings of an op's arguments are tried: a bounded choice, the same in every run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

Shape = tuple[int, ...]
# Per tensor argument the dimension that is sharded, None for Replicate.
Sharding = tuple[int | None, ...]


def shardings(shapes: Sequence[Shape], limit: int) -> list[Sharding]:
    """At most `limit` shardings of tensors of these shapes on a one-dimensional mesh.

    In the order of what users write: each dimension of the first tensor, with tensors of the same
    shape sharded alike; that tensor alone; each other tensor alone; mixtures; nothing sharded.
    """
    found: dict[Sharding, None] = {}
    for sharding in _in_order(shapes):
        found.setdefault(sharding)
        if len(found) == limit:
            break
    return list(found)


def is_uneven(shapes: Sequence[Shape], sharding: Sharding, world_size: int) -> bool:
    """Whether ranks hold shards of different sizes."""
    return any(d is not None and s[d] % world_size for s, d in zip(shapes, sharding))


def text(sharding: Sharding) -> str:
    """`S(0) R`: one letter per tensor, as DTensor prints placements."""
    return " ".join("R" if dim is None else f"S({dim})" for dim in sharding)


def _in_order(shapes: Sequence[Shape]) -> Iterator[Sharding]:
    nothing: Sharding = (None,) * len(shapes)
    largest = max((i for i, s in enumerate(shapes) if s), key=lambda i: len(shapes[i]), default=0)
    leading = 0 if shapes and shapes[0] else largest
    if shapes:
        for dim in range(len(shapes[leading])):
            yield tuple(dim if s == shapes[leading] else None for s in shapes)
    for i, shape in enumerate(shapes):
        for dim in range(len(shape)):
            yield (*nothing[:i], dim, *nothing[i + 1 :])
    # Mixtures of two tensors first: a list of many tensors has too many mixtures to walk.
    pairs = itertools.combinations(range(len(shapes)), 2)
    for i, j in itertools.islice(pairs, 16):
        for a, b in itertools.product(range(len(shapes[i])), range(len(shapes[j]))):
            mixed = list(nothing)
            mixed[i], mixed[j] = a, b
            yield tuple(mixed)
    yield nothing
