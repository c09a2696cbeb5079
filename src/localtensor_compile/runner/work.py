"""The c10d Work of a call between ranks: waiting lets the other ranks run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.futures import Future

from ._torch_dynamo import untraced
from .exchange import Pending


@untraced("wait", "synchronize", "is_completed", "result", "get_future", "source_rank")
class RunnerWork(dist.Work):
    """Done when all of `pending` are. torch's C++ (DDP, functional collectives) waits on it too."""

    def __init__(self, pending: Sequence[Pending], result: Any) -> None:
        super().__init__()
        self._pending = list(pending)
        self._result = result

    def wait(self, timeout: Any = None) -> bool:
        """Wait. A call that nobody answers is reported at once, whatever the time-out."""
        for one in self._pending:
            one.wait()
        return True

    def synchronize(self) -> None:
        self.wait()

    block_current_stream = synchronize

    def is_completed(self) -> bool:
        """Whether it is done. Programs that poll let the other ranks run."""
        for one in self._pending:
            if not one.done:
                one.exchange.scheduler.give_way()
        return all(one.done for one in self._pending)

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        return next((one.error for one in self._pending if one.error is not None), None)

    def result(self) -> Any:
        self.wait()
        return self._result

    def get_future(self) -> Future:
        """A future that is done: C++ waits for futures where no other rank could run."""
        self.wait()
        future: Future = Future()
        future.set_result(self._result)
        return future

    def source_rank(self) -> int:
        """The group rank that a recv from any source got its data from."""
        self.wait()
        source = self._pending[0].source
        return -1 if source is None else source

    _source_rank = source_rank
