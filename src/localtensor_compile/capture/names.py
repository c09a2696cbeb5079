"""What the inputs and outputs of AOTAutograd's flat graphs are: whose, and called what by the user.

AOTAutograd describes each with a descriptor (torch/_functorch/_aot_autograd/descriptors.py), the
shard of rank 2 of input 3 with `SubclassGetAttrAOTInput(PlainAOTInput(3), "_local_tensor_2")`.
Dynamo knows where in the user's frame it found that input.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

_RANK = re.compile(r"_local_tensor_(\d+)")
_PART = re.compile(r"\[\s*['\"]?([^'\"\[\]]+)['\"]?\s*\]|\.(\w+)")
_HIDDEN = {"_modules", "_parameters", "_buffers", "self", "L", "G"}
_SIZE = re.compile(r"(.*)\.(size|stride)\(\)\[(\d+)\]")
# Descriptors of the sizes that a tensor has as a whole.
_NUMBERS = {"SubclassSizeAOTInput": "size", "SubclassStrideAOTInput": "stride"}
SAVED = "saved"
# The rank of outputs that only put LocalTensors together again.
NOBODY = -1


@dataclass(frozen=True)
class Known:
    """An input or output of a flat graph.

    Attributes:
        kind: `input`, `parameter`, `buffer`, `tangent`, `saved`; for outputs empty.
        label: what the user calls it; outputs: `return[0]`, `gradient[x]`, `mutated[x]`, `saved`.
        rank: whose shard it is, None where it is no shard.
    """

    kind: str
    label: str
    rank: int | None


def frame_names(graph: fx.Graph) -> list[tuple[str, str]]:
    """(kind, name) of each input of a Dynamo graph: `("parameter", "up.weight")`.

    Names of parameters and buffers are those in their module, where all are of one.
    """
    found = []
    for node in graph.nodes:
        if node.op == "placeholder":
            argument = node.meta.get("grapharg")
            source = getattr(argument, "source", None)
            found.append(_of_source(_source_text(source)) if source else ("input", node.name))
    roots = {name.partition(".")[0] for kind, name in found if kind != "input"}
    if len(roots) != 1:
        return found
    root = f"{roots.pop()}."
    return [(kind, name if kind == "input" else name.removeprefix(root)) for kind, name in found]


def _source_text(source: Any) -> str:
    name = source.name
    return name() if callable(name) else str(name)  # a method before torch 2.10


def _of_source(text: str) -> tuple[str, str]:
    size = _SIZE.fullmatch(text)
    if size:
        return "input", f"{_of_source(size[1])[1]}.{size[2]}({size[3]})"
    kind = "parameter" if "_parameters" in text else "buffer" if "_buffers" in text else "input"
    parts = [a or b for a, b in _PART.findall(text)]
    kept = [p for p in parts if p not in _HIDDEN]
    return kind, ".".join(kept) or text


def input_of(node: fx.Node, names: Sequence[tuple[str, str]]) -> Known:
    """What a placeholder of a flat graph is; without a descriptor it was saved by the forward."""
    desc = node.meta.get("desc")
    if desc is None:
        return Known(SAVED, node.name, None)
    base, rank = _base(desc)
    kind = type(base).__name__
    if kind == "TangentAOTInput":
        return Known("tangent", _tangent(_output_label(base.output, names)), rank)
    kind, label = _input_label(base, names)
    size = _NUMBERS.get(type(desc).__name__)
    if size is None:
        return Known(kind, label, rank)
    of_shard = ".to_local()" if getattr(desc.base, "attr", "") == "_local_tensor" else ""
    return Known("input", f"{label}{of_shard}.{size}({desc.idx})", rank)


def is_stack(node: fx.Node) -> bool:
    """Whether a placeholder of a flat graph is the stack of a LocalTensor."""
    desc = node.meta.get("desc")
    while hasattr(desc, "base"):
        if getattr(desc, "attr", "") == "_stack":
            return True
        desc = desc.base
    return False


def _tangent(output: str) -> str:
    """`tangent_0` for `return[0]`: other lines name it."""
    return "tangent_" + output.removeprefix("return[").rstrip("]").replace("[", "_")


def output_of(desc: Any, names: Sequence[tuple[str, str]]) -> Known:
    """What an output of a flat graph is, by its descriptor."""
    if type(desc).__name__ in ("SubclassSizeAOTOutput", "SubclassStrideAOTOutput"):
        return Known("", str(desc.expr()), NOBODY)
    base, rank = _base(desc)
    return Known("", _output_label(base, names), rank)


def _base(desc: Any) -> tuple[Any, int | None]:
    """What a shard is a shard of, and of which rank."""
    rank = None
    while hasattr(desc, "base"):
        found = _RANK.fullmatch(str(getattr(desc, "attr", "")))
        rank = int(found[1]) if found else rank
        desc = desc.base
    return desc, rank


def _input_label(desc: Any, names: Sequence[tuple[str, str]]) -> tuple[str, str]:
    target = getattr(desc, "target", None)
    if target is not None:
        return ("parameter" if "Param" in type(desc).__name__ else "buffer"), str(target)
    index = getattr(desc, "idx", None)
    if type(desc).__name__ == "PlainAOTInput" and index is not None and index < len(names):
        return names[index]
    return "input", desc.expr() if hasattr(desc, "expr") else str(desc)


def _output_label(desc: Any, names: Sequence[tuple[str, str]]) -> str:
    kind = type(desc).__name__
    if kind == "PlainAOTOutput":
        return f"return[{desc.idx}]"
    if kind == "GradAOTOutput":
        return f"gradient[{_input_label(_base(desc.grad_of)[0], names)[1]}]"
    if kind == "InputMutationAOTOutput":
        return f"mutated[{_input_label(_base(desc.mutated_input)[0], names)[1]}]"
    if kind == "SavedForBackwardsAOTOutput":
        return SAVED
    return str(desc.expr() if hasattr(desc, "expr") else kind)
