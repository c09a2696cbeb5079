"""DistributedDataParallel's reducer for LocalTensors, in Python.

torch's own is C++ that reads and writes the memory of one process. This one keeps to the order of
its arithmetic (which parameters share a bucket, divide before the reduction, one all_reduce per
bucket), because the order decides the last bits. Nothing overlaps: a collective ends when it is
called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import disable_dynamo
from ..errors import LocalTensorError, UnsupportedError
from .bucket_memory import Bucket, GradBucket, flat_views, is_alias
from .bucket_parameters import assign_buckets, check_parameters


@dataclass
class _Iteration:
    """What is known about the backward that is going on."""

    ready: set[int] = field(default_factory=set)
    unused: list[int] = field(default_factory=list)
    unused_marked: bool = False
    next_bucket: int = 0
    calls_left: dict[int, int] = field(default_factory=dict)


class Reducer:
    """Takes the place of torch.distributed.Reducer; the arguments and methods are torch's.

    Raises:
        PlainTensorError: a parameter is a plain tensor.
        UnsupportedError: sparse gradients, or parameters whose buckets would differ between ranks.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        bucket_indices: list[list[int]],
        per_bucket_size_limits: list[int],
        process_group: Any,
        expect_sparse_gradients: Sequence[bool],
        bucket_bytes_cap: int,
        find_unused_parameters: bool,
        gradient_as_bucket_view: bool,
        param_to_name_mapping: dict[int, str],
        first_bucket_bytes_cap: int,
        skip_all_reduce_unused_params: bool = False,
        use_python_reducer: bool = False,
        bucket_size_limits_for_rebuilding: Sequence[int] = (),
        batched_grad_copy: bool = False,
    ) -> None:
        self._params = list(params)
        self._group = process_group
        self._size_limits = list(bucket_size_limits_for_rebuilding) or [
            first_bucket_bytes_cap,
            bucket_bytes_cap,
        ]
        self._find_unused = find_unused_parameters
        self._as_view = gradient_as_bucket_view
        self._batched_copy = batched_grad_copy
        self._static_graph = False
        self._hook: Callable[[GradBucket], Any] | None = None
        self._iterations = 0
        self._expects_hooks = False
        self._unfinished = False
        self._rebuilt = False
        self._arrival: list[int] = []
        self._used: set[int] = set()
        self._calls: dict[int, int] = dict.fromkeys(range(len(self._params)), 0)
        self._iteration = _Iteration()
        check_parameters(self._params)
        if any(expect_sparse_gradients):
            raise UnsupportedError(
                "DistributedDataParallel with sparse gradients is not simulated. Use "
                "Embedding(..., sparse=False)."
            )
        self._buckets = self._make_buckets(bucket_indices)
        self._accumulators: list[Any] = []
        self._handles: list[Any] = []
        if use_python_reducer:  # DDP's own Python hooks reduce then
            return
        for index, param in enumerate(self._params):
            # Held here: autograd keeps only a weak reference to it, and its hooks go with it.
            node = torch.autograd.graph.get_gradient_edge(param).node
            self._accumulators.append(node)
            self._handles.append(node.register_hook(self._on_gradient(index)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for them
            raise AttributeError(name)
        raise UnsupportedError(
            f"DistributedDataParallel's Reducer.{name} is not simulated. Supported are gradient "
            "buckets, no_sync, find_unused_parameters, static_graph, gradient_as_bucket_view and "
            "communication hooks."
        )

    # ---- buckets
    def _make_buckets(self, bucket_indices: list[list[int]]) -> list[Bucket]:
        return [self._make_bucket(list(indices)) for indices in bucket_indices]

    def _make_bucket(self, indices: list[int]) -> Bucket:
        params = [self._params[i].detach() for i in indices]
        numel = sum(p.numel() for p in params)
        contents = params[0].new_empty((numel,))
        bucket = Bucket(indices, contents, flat_views(contents, params))
        if self._as_view:
            for index, view in zip(indices, bucket.views):
                grad = self._params[index].grad
                if grad is not None:
                    with torch.no_grad():
                        view.copy_(grad)
                    self._params[index].grad = view
        return bucket

    @disable_dynamo
    def _rebuild_buckets(self) -> bool:
        """After the first backward: buckets in the order in which gradients arrived."""
        self._check_finished()
        if not self._may_rebuild() or not self._arrival:
            return False
        arrived = [self._params[i] for i in self._arrival]
        indices, _ = assign_buckets(
            arrived, self._size_limits, [False] * len(self._params), self._arrival
        )
        self._rebuilt = True
        self._arrival = []
        self._buckets = self._make_buckets(indices)
        return True

    def _may_rebuild(self) -> bool:
        return (self._static_graph or not self._find_unused) and not self._rebuilt

    # ---- an iteration
    @disable_dynamo
    def prepare_for_forward(self) -> None:
        self._iterations += 1

    @disable_dynamo
    def prepare_for_backward(self, outputs: Sequence[Tensor]) -> None:
        self._expects_hooks = True
        for bucket in self._buckets:
            bucket.pending = len(bucket.indices)
        unused = self._iteration.unused
        self._iteration = _Iteration(calls_left=dict(self._calls))
        if self._static_graph:
            self._iteration.unused = unused
        elif self._find_unused:
            used = _reachable(outputs)
            self._iteration.unused = [
                i for i, node in enumerate(self._accumulators) if node not in used
            ]

    def _on_gradient(self, index: int) -> Callable[..., None]:
        def hook(*grads: Any) -> None:
            self._autograd_hook(index)

        return hook

    def _autograd_hook(self, index: int) -> None:
        if not self._expects_hooks:  # no_sync
            return
        iteration = self._iteration
        first_static = self._static_graph and self._iterations == 1
        # The hook also runs where an output that the loss leaves out gives no gradient.
        if self._params[index].grad is not None:
            self._used.add(index)
        if first_static:
            self._calls[index] += 1
            return
        if not iteration.unused_marked:
            iteration.unused_marked = True
            for unused in iteration.unused:
                self._mark_ready(unused)
        if self._static_graph:
            if iteration.calls_left[index] <= 0:
                raise LocalTensorError(
                    "Your training graph has changed in this iteration, e.g., one parameter is "
                    "unused in first iteration, but then got used in the second iteration. this is "
                    "not compatible with static_graph set to True."
                )
            iteration.calls_left[index] -= 1
            if iteration.calls_left[index]:
                return
        if self._may_rebuild():
            self._arrival.append(index)
        self._mark_ready(index)

    def _mark_ready(self, index: int) -> None:
        iteration = self._iteration
        if index in iteration.ready:
            raise LocalTensorError(
                "Expected to mark a variable ready only once: parameter at index "
                f"{index} has been marked as ready twice in one backward. Either a parameter is "
                "used outside `forward`, or in several reentrant backward passes (checkpoint), or "
                "unused parameters were detected wrongly. Try static_graph=True if the graph "
                "does not change."
            )
        iteration.ready.add(index)
        self._unfinished = True
        bucket = next(b for b in self._buckets if index in b.indices)
        self._copy_in(bucket, index)
        bucket.pending -= 1
        while iteration.next_bucket < len(self._buckets):
            if self._buckets[iteration.next_bucket].pending:
                return
            self._reduce(iteration.next_bucket)
            iteration.next_bucket += 1
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    @torch.no_grad()
    def _copy_in(self, bucket: Bucket, index: int) -> None:
        view = bucket.views[bucket.indices.index(index)]
        param = self._params[index]
        grad = param.grad
        # A communication hook divides as it likes. torch multiplies while it copies.
        divide = self._hook is None and not self._batched_copy
        size = self._group.size()
        if grad is None:
            view.zero_()
        elif is_alias(grad, view):
            if divide:
                view.div_(size)
        else:
            if divide:
                torch.mul(grad.detach(), 1.0 / size, out=view)
            else:
                view.copy_(grad)
            if self._as_view:
                param.grad = view

    @torch.no_grad()
    def _reduce(self, position: int) -> None:
        bucket = self._buckets[position]
        if self._hook is None:
            if self._batched_copy:
                bucket.contents.div_(self._group.size())
            dist.all_reduce(bucket.contents, group=self._group)
            return
        params = [self._params[i] for i in bucket.indices]
        last = position == len(self._buckets) - 1
        bucket.future = self._hook(
            GradBucket(position, bucket.contents, bucket.views, params, last)
        )

    def _delay_all_reduce(self) -> None:
        """The first backward with a static graph: everything is reduced at its end."""
        iteration = self._iteration
        iteration.unused = [i for i, calls in self._calls.items() if not calls]
        for bucket in self._buckets:
            for index in bucket.indices:
                self._copy_in(bucket, index)
        for position in range(len(self._buckets)):
            self._reduce(position)
        self._unfinished = True
        self._finish()

    def _finish(self) -> None:
        if not self._unfinished:
            return
        if self._static_graph and self._iterations > 1 and self._may_rebuild():
            self._arrival += self._iteration.unused
        self._expects_hooks = self._unfinished = False
        for bucket in self._buckets:
            self._copy_out(bucket)
        if not self._static_graph:
            self._used.clear()

    @torch.no_grad()
    def _copy_out(self, bucket: Bucket) -> None:
        params = [self._params[i] for i in bucket.indices]
        views = bucket.views
        if bucket.future is not None:
            result = bucket.future.wait()
            bucket.future = None
            if isinstance(result, (list, tuple)):
                (result,) = result
            views = flat_views(result, [p.detach() for p in params])
        for index, param, view_in, view in zip(bucket.indices, params, bucket.views, views):
            unused = (self._static_graph or self._find_unused) and index not in self._used
            if self._as_view:
                if view is not view_in and not is_alias(view_in, view):
                    view_in.copy_(view)
                if not unused and param.grad is None:
                    param.grad = view_in
            elif unused:
                continue
            elif param.grad is None:
                param.grad = view.clone()
            else:
                param.grad.copy_(view)

    def _check_finished(self) -> None:
        if not self._unfinished:
            return
        if self._static_graph:
            raise LocalTensorError(
                "Expected to have finished reduction in the prior iteration before starting a new "
                "one. Your training graph has changed: a parameter that was used in the first "
                "iteration got no gradient. This is not compatible with static_graph=True."
            )
        missing = [i for i in range(len(self._params)) if i not in self._iteration.ready]
        fix = (
            "Make sure that all outputs of `forward` take part in the loss"
            if self._find_unused
            else "Pass find_unused_parameters=True to DistributedDataParallel, and make sure that "
            "all outputs of `forward` take part in the loss"
        )
        raise LocalTensorError(
            "Expected to have finished reduction in the prior iteration before starting a new one. "
            f"Parameter indices which did not receive grad: {missing}. {fix}."
        )

    # ---- settings
    def set_logger(self, logger: Any) -> None:
        """torch's logger has nothing to do here."""

    def register_hook(self, hook: Callable[[GradBucket], Any]) -> None:
        """Let `hook(bucket)`, which returns a future, reduce the buckets."""
        if self._hook is not None:
            raise LocalTensorError(
                "register_comm_hook or register_builtin_comm_hook can only be called once."
            )
        self._hook = hook

    def _set_static_graph(self) -> None:
        if self._iterations:
            raise LocalTensorError(
                "set_static_graph() should be called before training loop starts and after "
                "DistributedDataParallel is constructed."
            )
        self._static_graph = True

    def _remove_autograd_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _check_reducer_finalized(self) -> None:
        self._check_finished()


class Logger:
    """Takes the place of torch.distributed.Logger: keeps nothing."""

    def __init__(self, reducer: Reducer) -> None:
        pass

    def set_construction_data_and_log(self, *args: Any) -> None:
        pass

    @disable_dynamo
    def set_runtime_stats_and_log(self) -> None:
        pass

    def set_error_and_log(self, error: str) -> None:
        pass

    def _set_comm_hook_name(self, name: str) -> None:
        pass

    def _set_static_graph(self) -> None:
        pass

    def _set_uneven_input_join(self) -> None:
        raise UnsupportedError(
            "DistributedDataParallel.join (ranks with different numbers of batches) is not "
            "simulated: all simulated ranks run one program. Give every rank as many batches."
        )

    def _get_ddp_logging_data(self) -> Any:
        raise UnsupportedError("DistributedDataParallel's logging data is not simulated.")


def _reachable(outputs: Sequence[Tensor]) -> set[Any]:
    """All nodes of the autograd graphs that end in `outputs`."""
    seen: set[Any] = set()
    queue = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while queue:
        for node, _ in queue.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                queue.append(node)
    return seen
