"""`Threads`: work on tensors by one thread a core, each with buffers of its own that it uses again and again."""

import concurrent.futures
import mmap
import os
import threading
from collections.abc import Callable, Iterable

import jax
import numpy as np

MAX_THREADS = 16


class Threads:
    """Runs jobs on all cores, and counts their bytes.

    Arguments:
        progress: is called with the bytes done and the bytes in all, by one thread at a time.
        done: bytes that were done before.
        total: bytes in all.
    """

    def __init__(self, progress: Callable[[int, int], None] | None, done: int, total: int):
        self._progress, self._done, self._total = progress, done, total
        self._lock, self._is_stopped = threading.Lock(), False
        self._local = threading.local()

    def run[T](self, jobs: Iterable[Callable[[], T]]) -> list[T]:
        """What they return, in their order; if one fails, the others stop when they next call `advance`."""
        threads = min(len(os.sched_getaffinity(0)), MAX_THREADS)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            try:
                futures = [pool.submit(self._run, job) for job in jobs]
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                self._is_stopped = True
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _run[T](self, job: Callable[[], T]) -> T:
        # Also where there is a GPU: the files are here, and it is the disk that everything waits for.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return job()

    def buffer(self, size: int, use: str = "values") -> np.ndarray:
        """This thread's buffer of bytes, one for each use. Aligned to pages: what is aligned JAX computes from without
        a copy.
        """
        buffers = self._local.__dict__.setdefault("buffers", {})
        if use not in buffers or buffers[use].size < size:
            buffers[use] = np.frombuffer(mmap.mmap(-1, max(size, mmap.PAGESIZE)), np.uint8)
        return buffers[use][:size]

    def scratch(self, shape: tuple[int, ...], dtype: str = "uint8", use: str = "values") -> jax.Array:
        """An array whose memory may be overwritten: this thread's last result of that use, if it fits."""
        kept = self._local.__dict__.setdefault("scratch", {}).pop(use, None)
        if kept is not None and (kept.shape, kept.dtype) == (shape, np.dtype(dtype)):
            return kept
        return jax.device_put(np.empty(shape, dtype))

    def keep_scratch(self, array: jax.Array, use: str = "values") -> None:
        self._local.__dict__.setdefault("scratch", {})[use] = array

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        if self._is_stopped:
            raise concurrent.futures.CancelledError
        if self._progress is not None:
            with self._lock:
                self._done += count
                self._progress(self._done, self._total)
