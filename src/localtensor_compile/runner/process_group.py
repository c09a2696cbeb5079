"""The process group of a rank's thread: c10d's methods as calls to the exchange.

torch.distributed's Python calls these methods by their old or new names; its C++ (functional
collectives, DDP's reducer) calls those that a Python process group may override.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..collectives import c10d as simulated
from ..collectives import plain
from ..errors import CollectiveError, UnsupportedError
from ..world.state import enabled_local_tensor_mode
from ._torch_dynamo import untraced
from .calls import Call
from .exchange import Exchange, Pending
from .stacks import user_line
from .work import RunnerWork

# Every call that may reach the exchange.
_CALLS = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "allgather_coalesced",
    "all_gather_single", "_allgather_base", "all_gather_single_coalesced",
    "allgather_into_tensor_coalesced", "reduce_scatter", "reduce_scatter_single",
    "_reduce_scatter_base", "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced",
    "gather", "scatter", "alltoall", "all_to_all_single", "alltoall_base", "barrier",
    "monitored_barrier", "send", "recv", "recv_anysource", "_start_coalescing", "_end_coalescing",
)  # fmt: skip


@untraced(*_CALLS)
class RunnerGroup(dist.ProcessGroup):
    """A group of ranks of a runner, as one of its members sees it.

    Args:
        exchange: where the members' calls meet.
        name: the group's name, alike on all members.
        ranks: global ranks, in group-rank order.
        rank: the global rank that this group object belongs to.
    """

    # What torch asks a backend about itself.
    supports_splitting = False
    supports_coalescing = False

    def __init__(self, exchange: Exchange, name: str, ranks: Sequence[int], rank: int) -> None:
        self._member = list(ranks).index(rank) if rank in ranks else -1
        super().__init__(max(self._member, 0), len(ranks))
        self._exchange = exchange
        self._name, self._desc = name, "undefined"
        self._ranks, self._global_rank = tuple(ranks), rank
        self._batch: list[Pending] | None = None

    # ---- who it is
    def rank(self) -> Any:
        if enabled_local_tensor_mode() is not None:
            return super().rank()
        return self._member

    def size(self) -> int:
        return len(self._ranks)

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def group_desc(self) -> str:
        return self._desc

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    setGroupName, setGroupDesc = _set_group_name, _set_group_desc

    def getGroupName(self) -> str:
        return self._name

    def getGroupDesc(self) -> str:
        return self._desc

    def getBackendName(self) -> str:
        # Not "gloo": DDP's C++ would look for gloo's own object. dist.get_backend() says gloo.
        return "localtensor"

    name = _get_backend_name = getBackendName

    def _get_backend(self, device: Any) -> RunnerGroup:
        return self

    def __repr__(self) -> str:
        return f"RunnerGroup({self._name!r}, ranks={list(self._ranks)}, rank={self._global_rank})"

    def shutdown(self) -> None:
        """Nothing to close."""

    abort = shutdown

    def set_timeout(self, timeout: timedelta) -> None:
        """Kept for nobody: calls that cannot be answered are reported at once."""

    _set_default_timeout = set_timeout

    def _set_sequence_number_for_group(self) -> None:
        """Counted by the exchange."""

    # ---- calling
    def _launch(self, kind: str, result: Any, **about: Any) -> RunnerWork:
        if self._member < 0:
            raise CollectiveError(
                f"{kind} on the group of ranks {list(self._ranks)} was called by rank "
                f"{self._global_rank}, which is not in the group."
            )
        call = Call(
            rank=self._global_rank,
            kind=kind,
            group=self._name,
            ranks=self._ranks,
            line=user_line(),
            **about,
        )
        pending = self._exchange.launch(call)
        if self._batch is not None:
            self._batch.append(pending)
        return RunnerWork([pending], result)

    def _in_mode(self, op: str, method: str, tensors: Any, *rest: Any) -> RunnerWork | None:
        """Inside a LocalTensorMode of this thread the call is that of all its ranks."""
        if plain.has_local_tensor(tensors, {}):
            simulated._table[op](*tensors, self, *rest)
        elif enabled_local_tensor_mode() is not None:
            plain.collective(method, self, (*tensors, *rest), {})
        else:
            return None
        return RunnerWork([], tensors[0])

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> RunnerWork:
        tensors = _listed(tensors)
        op = _reduce_op(opts)
        return self._in_mode("allreduce_", "allreduce", (tensors,), op) or self._launch(
            "all_reduce", tensors, inputs=tensors, reduce_op=op
        )

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> RunnerWork:
        op = _reduce_op(opts)
        name = "allreduce_coalesced"
        return self._in_mode(f"{name}_", name, (tensors,), op) or self._launch(
            "all_reduce_coalesced", tensors, inputs=list(tensors), reduce_op=op
        )

    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> RunnerWork:
        tensors, root = _listed(tensors), _root(opts)
        return self._in_mode("broadcast_", "broadcast", (tensors,), root) or self._launch(
            "broadcast", tensors, inputs=tensors, root=root
        )

    def reduce(
        self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None
    ) -> RunnerWork:
        tensors, root = _listed(tensors), _root(opts)
        op = _reduce_op(opts if op is None else op)
        return self._in_mode("reduce_", "reduce", (tensors,), op, root) or self._launch(
            "reduce", tensors, inputs=tensors, reduce_op=op, root=root
        )

    def allgather(
        self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None
    ) -> RunnerWork:
        if isinstance(inputs, Tensor):
            outputs, inputs = [outputs], [inputs]
        return self._in_mode("allgather_", "allgather", (outputs, inputs)) or self._launch(
            "all_gather", outputs, inputs=inputs, outputs=outputs
        )

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> RunnerWork:
        name = "allgather_coalesced"
        return self._in_mode(f"{name}_", name, (outputs, inputs)) or self._launch(
            "all_gather_coalesced", outputs, inputs=inputs, outputs=outputs
        )

    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> RunnerWork:
        return self._in_mode("_allgather_base_", "_allgather_base", (output, input)) or (
            self._launch("all_gather_into_tensor", output, inputs=[input], outputs=[output])
        )

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: Any, inputs: Any, opts: Any = None
    ) -> RunnerWork:
        name = "allgather_into_tensor_coalesced"
        return self._in_mode(f"{name}_", name, (outputs, inputs)) or self._launch(
            "all_gather_into_tensor_coalesced", outputs, inputs=inputs, outputs=outputs
        )

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(
        self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None
    ) -> RunnerWork:
        if isinstance(outputs, Tensor):
            outputs, inputs = [outputs], [inputs]
        op = _reduce_op(opts)
        name = "reduce_scatter"
        return self._in_mode(f"{name}_", name, (outputs, inputs), op) or self._launch(
            name, outputs, inputs=inputs, outputs=outputs, reduce_op=op
        )

    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> RunnerWork:
        op = _reduce_op(opts)
        name = "_reduce_scatter_base"
        return self._in_mode(f"{name}_", name, (output, input), op) or self._launch(
            "reduce_scatter_tensor", output, inputs=[input], outputs=[output], reduce_op=op
        )

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: Any, inputs: Any, opts: Any = None
    ) -> RunnerWork:
        op = _reduce_op(opts)
        name = "reduce_scatter_tensor_coalesced"
        return self._in_mode(f"{name}_", name, (outputs, inputs), op) or self._launch(
            name, outputs, inputs=inputs, outputs=outputs, reduce_op=op
        )

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def gather(
        self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None
    ) -> RunnerWork:
        if isinstance(inputs, Tensor):
            outputs, inputs = [outputs], [inputs]
        root = _root(opts)
        return self._in_mode("gather_", "gather", (outputs, inputs), root) or self._launch(
            "gather", outputs, inputs=inputs, outputs=outputs, root=root
        )

    def scatter(
        self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None
    ) -> RunnerWork:
        if isinstance(outputs, Tensor):
            outputs, inputs = [outputs], [inputs]
        root = _root(opts)
        return self._in_mode("scatter_", "scatter", (outputs, inputs), root) or self._launch(
            "scatter", outputs, inputs=inputs, outputs=outputs, root=root
        )

    def alltoall(
        self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None
    ) -> RunnerWork:
        return self._in_mode("alltoall_", "alltoall", (outputs, inputs)) or self._launch(
            "all_to_all", outputs, inputs=inputs, outputs=outputs
        )

    def all_to_all_single(
        self,
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        opts: Any = None,
        timeout: Any = None,
    ) -> RunnerWork:
        splits = list(output_split_sizes or ()), list(input_split_sizes or ())
        mode = self._in_mode("alltoall_base_", "alltoall_base", (output, input), *splits)
        return mode or self._launch(
            "all_to_all_single", output, inputs=[input], outputs=[output], splits=splits
        )

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None, timeout: Any = None) -> RunnerWork:
        if enabled_local_tensor_mode() is not None:
            return RunnerWork([], [])
        return self._launch("barrier", [])

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        if enabled_local_tensor_mode() is None:
            self._launch("monitored_barrier", []).wait()

    # ---- point to point
    def send(self, tensors: Any, dst: int, tag: int = 0) -> RunnerWork:
        self._require_one_program("send", tensors)
        return self._launch("send", tensors, inputs=list(tensors), peer=dst, tag=tag)

    def recv(self, tensors: Any, src: int, tag: int = 0) -> RunnerWork:
        self._require_one_program("recv", tensors)
        return self._launch("recv", tensors, outputs=list(tensors), peer=src, tag=tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> RunnerWork:
        self._require_one_program("recv", tensors)
        return self._launch("recv", tensors, outputs=list(tensors), peer=None, tag=tag)

    def _require_one_program(self, what: str, tensors: Any) -> None:
        if plain.has_local_tensor(tensors, {}):
            raise CollectiveError(
                f"{what} of a LocalTensor, which holds shards of several ranks, by rank "
                f"{self._global_rank}. Send the shard of one rank: "
                f"tensor._local_tensors[{self._global_rank}]."
            )

    # ---- several calls as one
    def _start_coalescing(self, device: Any) -> None:
        self._batch = []

    def _end_coalescing(self, device: Any) -> RunnerWork:
        batch, self._batch = self._batch or [], None
        return RunnerWork(batch, [])

    # ---- what is not simulated
    def split_group(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            "ProcessGroup.split_group is not simulated: gloo has none either. Use "
            "torch.distributed.new_group."
        )

    merge_remote_group = split_group


def _listed(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _reduce_op(opts: Any) -> Any:
    if opts is None:
        return dist.ReduceOp.SUM
    return getattr(opts, "reduceOp", opts)


def _root(opts: Any) -> int:
    return opts if isinstance(opts, int) else getattr(opts, "rootRank", 0)
