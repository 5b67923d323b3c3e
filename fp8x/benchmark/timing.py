"""How long a call takes on the device.

Calls are queued back to back, so that the device never waits for the host, over several sets of inputs, so that a call
does not find its inputs in the L2 cache. `Timing.seconds` has everything that a call launches and the gaps between;
`Timing.kernels` has the kernels alone, from CUPTI.
"""

import contextlib
import dataclasses
import fcntl
import math
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

L2_BYTES = 60 * 2**20  # of an H200
REPEATS = 20
BATCH_SECONDS = 0.01  # queued at a time: long beside the wait at its end
MAX_SECONDS = 2.0  # for a timing as a whole, where fewer repeats are enough
ALONE_SECONDS = 25  # after which a process that has the GPU for itself hangs


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one call.

    Attributes:
        seconds: the median over `repeats` of a batch's time over the number of its calls.
        spread: the distance between the quartiles of those, over the median.
        repeats: batches.
        calls: calls a batch.
        host_seconds: what the host needed to launch a call. Near `seconds`, the device waited for the host.
        kernels: the median seconds a call of each kernel, by name; None where CUPTI gave none.
        note: why there are no kernels.
    """

    seconds: float
    spread: float
    repeats: int
    calls: int
    host_seconds: float
    kernels: dict[str, float] | None = None
    note: str | None = None

    @property
    def kernel_seconds(self) -> float | None:
        """All kernels of a call, without the gaps between them."""
        return None if self.kernels is None else sum(self.kernels.values())

    def of_kernels(self, part: str) -> float | None:
        """Those kernels of a call whose name has `part` in it; None where there are none."""
        found = [seconds for name, seconds in (self.kernels or {}).items() if part in name]
        return sum(found) if found else None


def sets_needed(nbytes: int, most: int = 8) -> int:
    """How many sets of inputs of `nbytes` each it takes so that a call finds none of its own in the cache."""
    return min(most, 1 + math.ceil(2 * L2_BYTES / max(nbytes, 1)))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The GPU for this process alone, among those with the same file in $FP8X_GPU_LOCK; one that hangs is killed.

    So several processes compile at once, and one of them at a time measures.
    """
    global _is_alone
    path = os.environ.get("FP8X_GPU_LOCK")
    if path is None or _is_alone:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        signal.alarm(ALONE_SECONDS)
        _is_alone = True
        try:
            yield
        finally:
            _is_alone = False
            signal.alarm(0)


_is_alone = False  # this process, already


def time_calls(fn: Callable, inputs: Sequence[tuple]) -> tuple[Timing, list]:
    """The time of `fn(*arguments)`, run `alone`, and its results: one for each tuple of arguments in `inputs`.

    One program makes all the calls, since the host takes longer to launch one than the device needs for a small one.
    """
    program = chained(fn).lower(inputs).compile()
    with alone():
        results = jax.block_until_ready(program(inputs))
        return time_queue(lambda: program(inputs), jax.block_until_ready, len(inputs)), results


def chained(fn: Callable):
    """A compiled function that calls `fn` with each tuple of arguments that it gets."""

    def calls(inputs):
        results = []
        for arguments in inputs:
            # Each call waits for the one before, or XLA would fuse the small parts of several.
            arguments, _ = jax.lax.optimization_barrier((arguments, results[-1:]))
            results.append(fn(*arguments))
        return results

    return jax.jit(calls)


def time_queue(enqueue: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> Timing:
    """The time of a call, where `enqueue()` queues `calls` of them and `wait(result)` waits for what it gave."""
    wait(enqueue())
    start = time.perf_counter()
    wait(enqueue())
    once = time.perf_counter() - start
    batch = max(1, min(100, math.ceil(BATCH_SECONDS / once)))
    repeats = max(3, min(REPEATS, math.ceil(MAX_SECONDS / (batch * once))))
    seconds, host = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        result = enqueue()
        host.append((time.perf_counter() - start) / calls)  # a later one may wait for a place in the queue
        for _ in range(batch - 1):
            result = enqueue()
        wait(result)
        seconds.append((time.perf_counter() - start) / (batch * calls))
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds)
    timing = Timing(median, (high - low) / median, repeats, batch * calls, statistics.median(host))
    try:
        return dataclasses.replace(timing, kernels=_kernels(enqueue, wait, calls))
    except Exception as error:  # of CUPTI: another profiler holds it, or there is none
        return dataclasses.replace(timing, note=f"{type(error).__name__}: {error}")


def _kernels(enqueue: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> dict[str, float]:
    """Median seconds a call of each kernel, of any library in the process, over REPEATS calls or more."""
    cupti = _cupti()
    runs = max(5, math.ceil(REPEATS / calls))
    cupti._cupti_init()
    try:
        for _ in range(runs):
            wait(enqueue())
    finally:
        launches = cupti._cupti_get_timings(True)  # (name, milliseconds) in order
    if not launches or len(launches) % runs:
        raise RuntimeError(f"CUPTI saw {len(launches)} kernels in {runs} equal runs")
    size = len(launches) // runs
    sums = [_sum(launches[i * size : (i + 1) * size]) for i in range(runs)]
    return {name: statistics.median(run[name] for run in sums) / 1e3 / calls for name in sums[0]}


def _cupti():
    """What jax.experimental.mosaic.gpu.profiler measures with; that one takes functions of JAX alone."""
    from jax._src.lib import mosaic_gpu

    return mosaic_gpu._mosaic_gpu_ext


def _sum(launches: Sequence[tuple[str, float]]) -> Counter:
    found: Counter = Counter()
    for name, milliseconds in launches:
        found[name] += milliseconds
    return found
