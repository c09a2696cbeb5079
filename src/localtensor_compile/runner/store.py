"""The store of a runner: keys that ranks set and wait for, in the memory of this process."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .scheduler import Scheduler
from .stacks import user_line


class _Keys:
    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.values: dict[str, bytes] = {}
        # torch's C++ keeps a store alive, but not the Python part of it.
        self.clients: list[RunnerStore] = []


class _WaitsForKeys:
    def __init__(self, keys: _Keys, names: Sequence[str]) -> None:
        self.keys, self.names, self.line = keys, names, user_line()

    def ready(self) -> bool:
        return all(n in self.keys.values for n in self.names)

    def text(self) -> str:
        missing = [n for n in self.names if n not in self.keys.values]
        return f"Store.wait at {self.line}, for a rank that sets the keys {missing}"


class RunnerStore(dist.Store):
    """A c10d Store whose waiting lets other ranks run."""

    def __init__(self, keys: _Keys) -> None:
        super().__init__()
        self._keys = keys
        keys.clients.append(self)
        self._timeout = timedelta(minutes=30)

    @classmethod
    def of(cls, scheduler: Scheduler) -> RunnerStore:
        return cls(_Keys(scheduler))

    @property
    def scheduler(self) -> Scheduler:
        return self._keys.scheduler

    def of_rank(self) -> RunnerStore:
        """The same keys, as another client sees them."""
        return RunnerStore(self._keys)

    def set(self, key: str, value: Any) -> None:
        self._keys.values[key] = value.encode() if isinstance(value, str) else bytes(value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._keys.values[key]

    def add(self, key: str, amount: int) -> int:
        total = int(self._keys.values.get(key, b"0")) + amount
        self._keys.values[key] = str(total).encode()
        return total

    def append(self, key: str, value: Any) -> None:
        more = value.encode() if isinstance(value, str) else bytes(value)
        self._keys.values[key] = self._keys.values.get(key, b"") + more

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        expected, desired = (v.encode() if isinstance(v, str) else v for v in (expected, desired))
        held = self._keys.values.get(key)
        if held is None and expected:
            return bytes(expected)
        if held is None or held == expected:
            self._keys.values[key] = bytes(desired)
        return self._keys.values[key]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are set. Programs that poll let the other ranks run."""
        if not all(k in self._keys.values for k in keys):
            self._keys.scheduler.give_way()
        return all(k in self._keys.values for k in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._keys.scheduler.wait(_WaitsForKeys(self._keys, list(keys)))

    def delete_key(self, key: str) -> bool:
        return self._keys.values.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self._keys.values)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(k) for k in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[Any]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        return True

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    def get_timeout(self) -> timedelta:
        return self._timeout

    @property
    def timeout(self) -> timedelta:
        return self._timeout

    def clone(self) -> RunnerStore:
        return self.of_rank()
