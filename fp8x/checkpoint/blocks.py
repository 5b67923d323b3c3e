"""`BlockFile`: a file of known size, written in any order by several threads, past the page cache.

Filling the page cache with what nobody reads soon costs more than the disk itself (5 times more where a virtual machine
has to be given the pages first), and the dirty pages would have to be waited for at the end anyway.
"""

import collections
import concurrent.futures
import errno
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fp8x.checkpoint.journal import Journal

BLOCK = 1 << 20  # a disk's full speed, and little memory; a multiple of any disk's sector
IN_FLIGHT = 8  # blocks on their way to the disk, before those who fill more have to wait
SYNC_SECONDS = 0.5  # what a kill costs, and the time of many an fsync, which takes some milliseconds
O_DIRECT = getattr(os, "O_DIRECT", 0)


class Disk:
    """Writes full blocks in a thread of its own, so that those who fill them need not wait."""

    def __init__(self):
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._slots = threading.BoundedSemaphore(IN_FLIGHT)
        self._free: collections.deque[np.ndarray] = collections.deque()
        self._error: BaseException | None = None

    def buffer(self) -> np.ndarray:
        """A block's worth of bytes, aligned as direct writes need it."""
        try:
            return self._free.pop()
        except IndexError:
            return np.frombuffer(mmap.mmap(-1, BLOCK), np.uint8)

    def submit(self, write: Callable[[np.ndarray], None], buffer: np.ndarray) -> None:
        """Calls `write(buffer)` later, and takes the buffer back.

        Raises:
            OSError: an earlier write failed.
        """
        self._slots.acquire()
        self._thread.submit(self._run, write, buffer)
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Waits for what was submitted."""
        self._thread.shutdown(wait=True)

    def _run(self, write: Callable[[np.ndarray], None], buffer: np.ndarray) -> None:
        try:
            if self._error is None:
                write(buffer)
        except BaseException as error:
            self._error = error
        finally:
            self._free.append(buffer)
            self._slots.release()


class BlockFile:
    """A file of `size` bytes; `on_disk` is called once all of them are there.

    Arguments:
        journal: of this file. The blocks that it names stay as they are.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, path: Path, size: int, disk: Disk, on_disk: Callable[[], None], journal: Journal):
        self._size, self._journal, self._done = size, journal, journal.blocks
        self._missing = size - sum(map(self._block_size, self._done))
        self._unsynced: list[int] = []
        self._synced = time.monotonic()
        self._disk, self._on_disk = disk, on_disk
        self._blocks: dict[int, _Block] = {}
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (0 if self._done else os.O_TRUNC), 0o666)
        try:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(self._descriptor, 0, size)
            self._set_direct(True)
            if self._done and not self._missing:
                self._finish()
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, data: np.ndarray) -> None:
        """Writes bytes at an offset; each byte of the file is to be written once."""
        while data.size:
            index, start = divmod(offset, BLOCK)
            length = min(data.size, BLOCK - start)
            if index not in self._done:
                self._fill(index, start, data[:length])
            data, offset = data[length:], offset + length

    def _fill(self, index: int, start: int, data: np.ndarray) -> None:
        """Writes a part of a block, and submits the block if it is the last part."""
        with self._lock:
            if (block := self._blocks.get(index)) is None:
                block = self._blocks[index] = _Block(self._disk.buffer(), self._block_size(index))
        block.buffer[start : start + data.size] = data
        with self._lock:
            block.missing -= data.size
            is_full = block.missing == 0
            if is_full:
                del self._blocks[index]
        if is_full:
            self._disk.submit(lambda buffer: self._flush(index, buffer), block.buffer)

    def _block_size(self, index: int) -> int:
        return min(BLOCK, self._size - index * BLOCK)

    def sync(self) -> None:
        """Waits until all blocks that were written are on disk, and notes them; by one thread at a time."""
        if self._unsynced:
            os.fsync(self._descriptor)
            self._journal.add(self._unsynced)
            self._unsynced = []
        self._synced = time.monotonic()

    def _set_direct(self, is_direct: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | O_DIRECT if is_direct else flags & ~O_DIRECT)
            self._is_direct = is_direct
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._is_direct = False  # a file system that has no direct writes

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _flush(self, index: int, buffer: np.ndarray) -> None:
        view, offset = memoryview(buffer), index * BLOCK
        while view:
            try:
                written = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._set_direct(False)  # larger sectors than a page
                continue
            view, offset = view[written:], offset + written
        self._missing -= self._block_size(index)
        self._unsynced.append(index)
        if self._missing == 0:
            self._finish()
        elif time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def _finish(self) -> None:
        # The last block was written whole, too.
        os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)
        self._unsynced = []
        self.close()
        self._on_disk()
        self._journal.remove()


class _Block:
    def __init__(self, buffer: np.ndarray, missing: int):
        self.buffer, self.missing = buffer, missing
