"""Parallel Synchronization and Communication Instructions: mbarrier; bar and barrier.cluster."""

import dataclasses
from collections.abc import Callable

from ptx.program import PtxError

_MOST = 2**20 - 1  # arrivals, and bytes of transactions either way (Contents of the mbarrier object)


@dataclasses.dataclass(frozen=True)
class Wait:
    """What a warpgroup waits for; asked whether it is over until it is."""

    is_over: Callable[[], bool]
    what: Callable[[], str]


class MemoryBarrier:
    """An mbarrier. A phase ends when all arrivals and all bytes that they announced are there."""

    def __init__(self, count: int):
        if not 1 <= count <= _MOST:
            raise PtxError(f"an mbarrier of {count} arrivals")
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, count: int, expected_bytes: int = 0) -> None:
        """Arrivals, after they have announced transactions of so many bytes in all."""
        if count > self.pending:
            raise PtxError(f"{count} arrivals at an mbarrier where {self.pending} of {self.count} are still to come")
        self.bytes += expected_bytes
        self.pending -= count
        self._proceed()

    def complete(self, size: int) -> None:
        """A transaction of so many bytes is over."""
        self.bytes -= size
        self._proceed()

    def is_over(self, parity: int) -> bool:
        """Whether the phase of this parity is, of the current one and the one before it (mbarrier.try_wait)."""
        return self.phase % 2 != parity

    def _proceed(self) -> None:
        if abs(self.bytes) > _MOST:
            raise PtxError(f"an mbarrier's transactions are {self.bytes} bytes")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def __str__(self) -> str:
        return f"phase {self.phase} lacks {self.pending} of {self.count} arrivals and {self.bytes} bytes"


class ThreadBarrier:
    """A barrier of warpgroups: `bar`, or a cluster's."""

    def __init__(self, warpgroups: int):
        self.warpgroups, self.arrived = warpgroups, 0

    def arrive(self) -> int:
        """The number of the round to wait for."""
        self.arrived += 1
        return (self.arrived - 1) // self.warpgroups + 1

    def is_over(self, number: int) -> bool:
        return self.arrived >= number * self.warpgroups
