"""A torch.compile backend that keeps the graphs it is given, and runs them as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from ..compile.fx_graphs import output_node
from .names import frame_names
from .values import Call, kept

DYNAMO, JOINT, FORWARD, BACKWARD, POST_GRAD = STAGES = (
    "dynamo",
    "joint",
    "forward",
    "backward",
    "post_grad",
)


@dataclass
class Recorded:
    """The graphs of one frame that Dynamo captured.

    Attributes:
        names: (kind, name) of Dynamo's inputs.
        graphs: stage -> graph. Of `post_grad` there are two where there is a backward:
            `post_grad forward` and `post_grad backward`.
        forward_outputs: how many outputs of the joint graph are the forward's.
        static_inputs: those of the joint graph whose memory stays, as parameters'.
        calls: `forward` and `backward` -> their first call, where values are kept.
    """

    names: list[tuple[str, str]]
    graphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    forward_outputs: int = 0
    static_inputs: tuple[int, ...] = ()
    calls: dict[str, Call] = field(default_factory=dict)

    def keep(self, stage: str, graph: fx.GraphModule) -> None:
        self.graphs[stage] = copied(graph)


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph alone, which passes may change: its tensors are the user's."""
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output).meta.update(output_node(module).meta)
    return fx.GraphModule(module, graph)


class Recorder:
    """Makes the backend for torch.compile and has what it recorded.

    Args:
        inductor: compile with Inductor and keep its post-grad graphs; else run AOTAutograd's.
        values: keep what the graphs are given in their first call, and what they return.

    Attributes:
        frames: in the order in which Dynamo captured them.
    """

    def __init__(self, inductor: bool = False, values: bool = False) -> None:
        self.frames: list[Recorded] = []
        self._inductor = inductor
        self._values = values

    def backend(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Given to torch.compile."""
        recorded = Recorded(frame_names(module.graph))
        recorded.keep(DYNAMO, module)
        self.frames.append(recorded)
        if self._inductor:
            return self._compile_with_inductor(recorded, module, inputs)
        return self._compile(recorded, module, inputs)

    def _compile(self, recorded: Recorded, module: fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_func
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        def partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
            recorded.keep(JOINT, joint)
            recorded.forward_outputs = options["num_fwd_outputs"]
            recorded.static_inputs = tuple(options.get("static_lifetime_input_indices") or ())
            return min_cut_rematerialization_partition(joint, joint_inputs, **options)

        def runs(stage: str) -> Callable[[fx.GraphModule, Any], Any]:
            def run(graph: fx.GraphModule, _: Any) -> Any:
                if self._values:
                    return kept(graph, recorded.calls.setdefault(stage, Call()))
                return make_boxed_func(graph.forward)

            return run

        def inference(graph: fx.GraphModule, given: Any) -> Any:
            recorded.keep(FORWARD, graph)
            return runs(FORWARD)(graph, given)

        return aot_autograd(
            fw_compiler=runs(FORWARD),
            bw_compiler=runs(BACKWARD),
            inference_compiler=inference,
            partition_fn=partition,
        )(module, inputs)

    def _compile_with_inductor(
        self, recorded: Recorded, module: fx.GraphModule, inputs: Any
    ) -> Any:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(graph: fx.GraphModule, given: Any, **options: Any) -> Any:
            stage = f"{POST_GRAD} {BACKWARD if options.get('is_backward') else FORWARD}"

            def keep(lowered: fx.Graph) -> None:
                recorded.keep(stage, lowered.owning_module)

            # What comes from a cache would not be seen.
            with config.patch(post_grad_custom_post_pass=keep, force_disable_caches=True):
                return compile_fx_inner(graph, given, **options)

        return compile_fx(module, inputs, inner_compile=inner)


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before is used, nothing compiled within is left behind."""
    import torch
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    try:
        yield
    finally:
        torch.compiler.reset()


def graph_breaks() -> dict[str, int]:
    """Why Dynamo broke graphs since `fresh_compiler`, and how often."""
    from torch._dynamo.utils import counters

    return {str(reason): int(count) for reason, count in counters["graph_break"].items()}
