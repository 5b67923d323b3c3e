"""Global and shared memory, with the orders between accesses that PTX asks for.

TMA and wgmma access shared memory through the async proxy, loads and stores of threads through the generic one. Without
a `fence.proxy.async` between, nothing orders an access through one with an earlier one through the other, not even an
mbarrier (Memory Consistency Model: Proxies). What TMA has written is ordered by the mbarrier that it completes.
"""

from collections.abc import Iterator

import numpy as np

from ptx.launch import argument_address
from ptx.program import PtxError

# A block's shared memory begins with a kilobyte that CUDA reserves.
SHARED_BASE = 1024
_ARGUMENT = argument_address(1) - argument_address(0)


def swizzled(addresses: np.ndarray, width: int) -> np.ndarray:
    """Where TMA and wgmma put a byte of rows of `width` bytes: 16-byte chunks are exchanged by the row within 8 such.

    The pattern follows addresses, not boxes (Tensors: Swizzling Modes). 16 bytes is no swizzle.
    """
    return addresses ^ ((addresses >> 7 & width // 16 - 1) << 4)


class GlobalMemory:
    """The kernel's arrays, each at `argument_address(i)`; nothing else is there.

    Blocks run in no order, so no byte may be stored by two warpgroups, which `writers` has by their numbers.
    """

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = [array.reshape(-1).view(np.uint8) for array in arrays]
        self.writers = [np.zeros(array.shape, np.int32) for array in self.arrays]

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """`[lanes, size]` bytes."""
        content = np.empty((len(addresses), size), np.uint8)
        for i, lanes, offsets in self._parts(addresses, size):
            content[lanes] = self.arrays[i][offsets]
        return content

    def store(self, addresses: np.ndarray, content: np.ndarray, writer: int) -> None:
        """`writer` is the number of a warpgroup, from 1."""
        for i, lanes, offsets in self._parts(addresses, content.shape[1]):
            if set(np.unique(self.writers[i][offsets])) - {0, writer}:
                raise PtxError(f"bytes {offsets.min()} to {offsets.max()} of array {i} are stored by two warpgroups")
            self.arrays[i][offsets] = content[lanes]
            self.writers[i][offsets] = writer

    def _parts(self, addresses: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise PtxError(f"global addresses of {size} bytes that it does not divide")
        which = addresses // _ARGUMENT - 1
        for i in np.unique(which):
            if not 0 <= i < len(self.arrays):
                raise PtxError(f"{addresses[which == i][0]:#x} is in no array of the kernel")
            lanes = np.flatnonzero(which == i)
            offsets = (addresses[lanes] % _ARGUMENT)[:, None] + np.arange(size)
            if offsets.max() >= len(self.arrays[i]):
                raise PtxError(f"byte {offsets.max()} of array {i}, which has {len(self.arrays[i])}")
            yield int(i), lanes, offsets


class SharedMemory:
    """A block's. Methods raise PtxError where accesses are out of bounds or in no order.

    An access is an array of the bytes' addresses. `reading` and `writing` count transfers and wgmma under way, `loaded`
    and `stored` say which bytes a warpgroup has accessed since its last `fence`.
    """

    def __init__(self, size: int, warpgroups: int):
        end = SHARED_BASE + size
        self.bytes = np.full(end, 0xFF, np.uint8)
        self.reading, self.writing = np.zeros((2, end), np.int16)
        self.loaded, self.stored = np.zeros((2, warpgroups, end), bool)

    def load(self, warpgroup: int, addresses: np.ndarray, size: int) -> np.ndarray:
        """`[lanes, size]` bytes by a warpgroup's threads."""
        place = self._place(addresses, size)
        self._none(self.writing[place], place, f"read by warpgroup {warpgroup} while a transfer writes it")
        self.loaded[warpgroup, place] = True
        return self.bytes[place]

    def store(self, warpgroup: int, addresses: np.ndarray, content: np.ndarray) -> None:
        place = self._place(addresses, content.shape[1])
        self._none(self.writing[place], place, f"written by warpgroup {warpgroup} while a transfer writes it")
        self._none(self.reading[place], place, f"written by warpgroup {warpgroup} while it is read asynchronously")
        self.stored[warpgroup, place] = True
        self.bytes[place] = content

    def fence(self, warpgroup: int) -> None:
        """`fence.proxy.async` of all its threads (membar / fence)."""
        self.loaded[warpgroup] = self.stored[warpgroup] = False

    def begin_read(self, place: np.ndarray) -> None:
        """The async proxy reads these bytes from now on."""
        self._check(place)
        self._none(self.writing[place], place, "read asynchronously while a transfer writes it")
        self._none(
            self.stored[:, place].any(axis=0), place, "read asynchronously, and stored without a fence.proxy.async"
        )
        self.reading[place] += 1

    def end_read(self, place: np.ndarray) -> np.ndarray:
        self.reading[place] -= 1
        return self.bytes[place]

    def begin_write(self, place: np.ndarray) -> None:
        """The async proxy may write these bytes from now on."""
        self._check(place)
        self._none(self.writing[place], place, "written by two transfers")
        self._none(self.reading[place], place, "written by a transfer while it is read asynchronously")
        accessed = (self.loaded[:, place] | self.stored[:, place]).any(axis=0)
        self._none(accessed, place, "written by a transfer, and accessed by threads without a fence.proxy.async")
        self.writing[place] = 1

    def end_write(self, place: np.ndarray, content: np.ndarray) -> None:
        self.bytes[place] = content
        self.writing[place] = 0

    def _place(self, addresses: np.ndarray, size: int) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise PtxError(f"shared addresses of {size} bytes that it does not divide")
        place = addresses[:, None] + np.arange(size)
        self._check(place)
        return place

    def _check(self, place: np.ndarray) -> None:
        if place.size and (place.min() < SHARED_BASE or place.max() >= len(self.bytes)):
            raise PtxError(
                f"shared bytes {place.min()} to {place.max()}, where there are {SHARED_BASE} to {len(self.bytes) - 1}"
            )

    def _none(self, flags: np.ndarray, place: np.ndarray, what: str) -> None:
        if flags.any():
            raise PtxError(f"shared byte {place[flags.astype(bool)][0]} is {what}")
