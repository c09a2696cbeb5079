"""The private torch names that the lower layers need, each imported here and nowhere else.

What has to be *patched* in torch lives in world/torch_hooks.py; this module only reads.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS as OPDEFS
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import (
    AsyncCollectiveTensor as AsyncCollectiveTensor,
)

bucket_assignment = torch.distributed._compute_bucket_assignment_by_size


def mark_constructor_exportable(constructor: Any) -> Any:
    """Keep a wrapper's constructor callable in exported programs, where torch can do that."""
    try:
        from torch._export.wrappers import mark_subclass_constructor_exportable_experimental as mark
    except ImportError:  # pragma: no cover - depends on the torch version
        return constructor
    return mark(constructor)


VERSION: tuple[int, int] = tuple(int(v) for v in torch.__version__.split(".")[:2])  # type: ignore[assignment]
MIN_VERSION, MAX_VERSION = (2, 11), (2, 15)

disable_dynamo = torch._disable_dynamo
is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor


def own_frame_never_compiled(function: Any) -> Any:
    """Decorator: Dynamo inlines the function into user code, but never starts a graph in it, nor in
    what it calls."""
    try:
        from torch._C._dynamo.eval_frame import (
            _FrameAction,
            _FrameExecStrategy,
            set_code_exec_strategy,
        )
    except ImportError:  # pragma: no cover - depends on the torch version
        return function
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, skip)
    return function


def never_traced(function: Any) -> Any:
    """Decorator for a hot function that Dynamo must not compile, nor anything it calls.

    `torch._disable_dynamo` costs microseconds in every call. Here Dynamo is told once to leave the
    function's own frame alone, and what it calls is shielded only while Dynamo listens.
    """
    shielded = torch._disable_dynamo(function)
    try:
        from torch._C._dynamo.eval_frame import get_eval_frame_callback
        from torch._dynamo.eval_frame import skip_code
    except ImportError:  # pragma: no cover - depends on the torch version
        return shielded

    def call(*args: Any) -> Any:
        if get_eval_frame_callback() is None:
            return function(*args)
        return shielded(*args)

    skip_code(call.__code__)
    return call


_DispatchModeKey = torch._C._TorchDispatchModeKey


def fake_mode_active() -> bool:
    """Whether a FakeTensorMode is on the dispatch mode stack (or temporarily unset by torch)."""
    return torch._C._get_dispatch_mode(_DispatchModeKey.FAKE) is not None


def tracing_active() -> bool:
    """Whether values are being traced: a fake, functional or proxy mode is on the stack."""
    get = torch._C._get_dispatch_mode
    return (
        get(_DispatchModeKey.FAKE) is not None
        or get(_DispatchModeKey.FUNCTIONAL) is not None
        or get(_DispatchModeKey.PROXY) is not None
    )


def only_autograd_listens() -> bool:
    """Whether nothing but autograd stands between a call of an op and the tensors' own dispatch.

    No torch function mode, dispatch mode, torch.func transform, forward AD level, autocast,
    inference mode or profiler is active in this thread.
    """
    return (
        _len_dispatch_stack() == 0
        and _len_function_stack() == 0
        and _functorch_stack() is None
        and forward_ad._current_level < 0
        and not _any_autocast()
        and not torch.is_inference_mode_enabled()
        and not torch.autograd._profiler_enabled()
    )


_len_dispatch_stack = torch._C._len_torch_dispatch_stack
_len_function_stack = torch._C._len_torch_function_stack
_functorch_stack = torch._C._functorch.peek_interpreter_stack
_any_autocast = torch._C._is_any_autocast_enabled


def current_fake_mode() -> Any:
    """The fake tensor mode of the trace in progress, or None."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode()


def proxy_mode() -> Any:
    """The proxy tensor mode (make_fx) in progress, or None."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode()


def resolve_group(group: Any) -> Any:
    """The ProcessGroup of a group name, a boxed ProcessGroup or a ProcessGroup."""
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import _resolve_process_group

    if isinstance(group, str):
        return _resolve_process_group(group)
    if isinstance(group, torch.ScriptObject):
        return ProcessGroup.unbox(group)
    return group


def completed_work(result: Any) -> Any:
    """A boxed c10d Work that has already completed with `result`."""
    from torch.distributed import Work

    return Work.boxed(finished_work(result))


def reduce_op_of(reduce_op: Any) -> tuple[str, Any]:
    """The name of a ReduceOp in lower case, and the factor of PREMUL_SUM (else None).

    As it arrives at an op it is boxed, and nothing tells the factor of a boxed one.
    """
    from torch.distributed import ReduceOp

    if isinstance(reduce_op, str):
        return reduce_op.lower(), None
    boxed = isinstance(reduce_op, torch.ScriptObject)
    kind = reduce_op.op() if boxed else getattr(reduce_op, "op", reduce_op)
    name = next(n for n in _REDUCE_OPS if int(getattr(ReduceOp, n)) == int(kind))
    if name != "PREMUL_SUM":
        return name.lower(), None
    return name.lower(), None if boxed else reduce_op.factor


_REDUCE_OPS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM")


def mesh_rank_grids(mesh: Any) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The shape of a DeviceMesh and the ranks of every copy of it, row-major.

    A submesh stands for one copy per rank of the other dimensions of its root mesh. Hashable.
    """
    found = _grids.get(mesh)  # by value: meshes are immutable, and often built again
    if found is None:
        found = _grids[mesh] = _rank_grids(mesh)
    return found


_grids: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _rank_grids(mesh: Any) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    with torch._C.DisableTorchFunction(), unset_fake_temporarily():
        if hasattr(mesh, "_layout") and hasattr(mesh, "_rank_map"):
            rank_map = mesh._rank_map
            copies = mesh._layout.remap_to_tensor(rank_map)
            shape = tuple(copies.shape[1:])
            flat = copies.reshape(copies.shape[0], -1)
        else:  # pragma: no cover - torch before the layout based DeviceMesh
            shape = tuple(mesh.mesh.shape)
            flat = mesh.mesh.reshape(1, -1)
        return shape, tuple(tuple(row) for row in flat.tolist())


def finished_work(result: Any) -> Any:
    """A c10d Work that has already completed with `result`."""
    import torch._C._distributed_c10d as bindings
    from torch.futures import Future

    future: Any = Future()
    future.set_result(result)
    return bindings._create_work_from_future(future)  # type: ignore[attr-defined]


def group_ranks() -> dict[Any, dict[int, int]]:
    """{ProcessGroup: {global rank: group rank}} of every process group that exists."""
    from torch.distributed.distributed_c10d import GroupMember, _world

    # torch also records the groups that this process is no member of, under one marker.
    return {g: r for g, r in _world.pg_group_ranks.items() if g != GroupMember.NON_GROUP_MEMBER}


def sym_math(name: str) -> Any:
    """math.<name> that takes SymInts and SymFloats too."""
    return getattr(torch, f"_sym_{name}")


# ---- random ops in traced graphs (dispatch/random_nodes.py)
def trace_identity() -> Any:
    """An object that lives as long as the compilation in progress, or None where nothing records.

    One per frame that Dynamo compiles, shared by its subgraphs; else the tracer of make_fx.
    """
    mode = proxy_mode()
    if mode is None:
        return None
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    return mode.tracer if context is None else context


def traced_graph() -> Any:
    """The FX graph that ops are being recorded into, or None."""
    mode = proxy_mode()
    return None if mode is None else mode.tracer.graph


def keep_when_dead(op: Any) -> None:
    """Make every FX pass keep calls of `op` whose results nobody uses."""
    torch.fx.node.has_side_effect(op)


def stash_for_engine_threads(key: str, value: Any) -> None:
    """Store `value` where torch's autograd threads find it while they work for this thread."""
    before = sys.getrefcount(value)
    torch._C._stash_obj_in_tls(key, value)
    if sys.getrefcount(value) == before:
        # torch 2.11 takes no reference, and gives one back all the same when the thread ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def stashed(key: str) -> Any:
    """What `stash_for_engine_threads` stored in this thread or the one it works for, or None."""
    return torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else None


def in_traced_backward() -> bool:
    """Whether the op being recorded belongs to the backward half of AOTAutograd's joint graph.

    The nodes' own tags do not tell: they are lost inside autograd.Function. Looks for AOTAutograd's
    call of the autograd engine between here and the start of the innermost trace.
    """
    if torch._C._current_autograd_node() is None:
        return False
    frame: Any = sys._getframe(1)
    called = ""
    while frame is not None and frame.f_code.co_name != "dispatch_trace":
        module = frame.f_globals.get("__name__", "")
        if called == "torch.autograd" and module.startswith("torch._functorch._aot_autograd"):
            return True
        called = module
        frame = frame.f_back
    return False


def is_tangent(node: Any) -> bool:
    """Whether an FX node is an input of the backward half of AOTAutograd's joint graph."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def unbatched(tensor: Any) -> Any:
    """The tensor inside the wrappers of torch.func (vmap, grad); others as they are."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def vmap_randomness() -> str | None:
    """The `randomness` of the innermost torch.vmap that is running, or None."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return None
    from torch._C._functorch import CVmapInterpreterPtr, TransformType

    for interpreter in reversed(torch._C._functorch.get_interpreter_stack() or ()):
        if interpreter.key() == TransformType.Vmap:
            return CVmapInterpreterPtr(interpreter).randomness().name.lower()
    return None


def bind_unbacked(values: Any) -> None:
    """Tell the trace that data-dependent numbers among `values` need no place in the output.

    torch looks for every new symbol in what an op returns. A per-rank number holds one per rank,
    where torch cannot look; the graph of the shards binds each of them.
    """
    for value in values:
        node = getattr(value, "node", None)
        env = getattr(node, "shape_env", None)
        if node is not None and env is not None:
            env.ignorable_fresh_unbacked_symbols.extend(
                s for s in node.expr.free_symbols if s in env.pending_fresh_unbacked_symbols
            )


def exported_program(
    module: Any,
    signature: Any,
    *,
    in_spec: Any,
    out_spec: Any,
    range_constraints: Any,
    constants: dict[str, Any],
) -> Any:
    """An ExportedProgram of a graph as it stands. It may write to its inputs: not functional."""
    from torch._export.verifier import TrainingIRVerifier
    from torch.export import ExportedProgram
    from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature

    call = ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec)
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict={},
        range_constraints=range_constraints,
        module_call_graph=[ModuleCallEntry(fqn="", signature=call)],
        constants=constants,
        verifiers=[TrainingIRVerifier],
    )


def value_ranges(values: Any) -> dict[Any, Any]:
    """Symbol -> its range, for the symbols in the sizes of fake values."""
    found: dict[Any, Any] = {}
    for value in values:
        for part in value if isinstance(value, (list, tuple)) else [value]:
            sizes = (*part.shape, *part.stride()) if isinstance(part, torch.Tensor) else (part,)
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    env = size.node.shape_env
                    for symbol in size.node.expr.free_symbols:
                        if symbol in env.var_to_range:
                            found[symbol] = env.var_to_range[symbol]
    return found


def export_flat(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Any:
    """The ExportedProgram of a module of plain tensors: functional, of what stands below autograd.

    Above autograd, where torch.export.export traces, torch does not know what to do with an op on
    a tensor subclass that is made inside.
    """
    from torch.export._trace import _export

    return _export(model, args, kwargs, dynamic_shapes, strict=False, pre_dispatch=False)


def register_process_group(name: str, group: Any) -> None:
    """Let functional collectives find `group` under `name` too."""
    from torch._C._distributed_c10d import _register_process_group

    _register_process_group(name, group)


def process_group_named(name: str) -> Any:
    """The process group of a name, or None."""
    from torch._C._distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(name)
    except (RuntimeError, ValueError):
        return None
