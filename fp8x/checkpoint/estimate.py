"""How long a conversion will take, from a quick look at this machine."""

import contextlib
import dataclasses
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fp8x.checkpoint.plan import Plan

_BLOCK = 1 << 21
_BLOCKS = 8  # of a file that are read, and that are written
# Bytes of bf16 that a core quantizes while one widens a byte in numpy. Two cores of an AMD EPYC: 0.88 GB/s from tmpfs
# to tmpfs, by any recipe, beside 9.9 GB/s; benchmarks/convert.py prints both.
_WIDENED = 0.045


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What to expect of a conversion.

    Attributes:
        seconds: after JAX has started; on a machine with nothing else to do, within a factor of two.
        limit: what takes most of them: "reading", "computing" or "writing".
    """

    seconds: float
    limit: str


def estimate(plan: Plan, destination: Path) -> Estimate:
    """Reads a little of the source, computes a little, and writes a little beside the destination: under a second.

    Conversion does all three at once, so the slowest counts.
    """
    cores = len(os.sched_getaffinity(0))
    seconds = {
        "reading": plan.bytes_before / _reading(plan),
        "computing": plan.bytes_before / (_WIDENED * widening() * cores),
        "writing": plan.bytes_after / _writing(destination),
    }
    limit = max(seconds, key=seconds.__getitem__)
    return Estimate(seconds[limit], limit)


def _rate(work: Callable[[], int]) -> float:
    """Bytes a second."""
    start = time.perf_counter()
    count = work()
    return max(count, 1) / max(time.perf_counter() - start, 1e-6)


def _reading(plan: Plan) -> float:
    """From the middle of the largest file."""
    file = max(plan.reader.files, key=lambda file: file.stat().st_size)
    buffer = bytearray(_BLOCK)

    def read() -> int:
        with file.open("rb", buffering=0) as opened:
            opened.seek(max(file.stat().st_size // 2 - _BLOCK * _BLOCKS // 2, 0))
            return sum(opened.readinto(buffer) for _ in range(_BLOCKS))

    return _rate(read)


def widening() -> float:
    """bf16 to float32, in cache."""
    values, wide = np.ones(_BLOCK // 4, np.uint16), np.empty(_BLOCK // 4, np.uint32)

    def widen() -> int:
        for _ in range(_BLOCKS):
            np.left_shift(values, 16, out=wide, dtype=np.uint32)
        return _BLOCKS * values.nbytes

    return max(_rate(widen) for _ in range(3))


def _writing(destination: Path) -> float:
    """Past the page cache, in the nearest directory that is there; what can't be written is found out later."""
    directory = next(parent for parent in destination.absolute().parents if parent.is_dir())
    block = mmap.mmap(-1, _BLOCK)  # aligned to pages
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=directory) as file:
        # By way of /dev/fd: the file has no name, so that nothing is left of it whenever the process is killed.
        descriptor = os.open(f"/dev/fd/{file.fileno()}", os.O_WRONLY | getattr(os, "O_DIRECT", 0))
        try:
            return _rate(lambda: _write(descriptor, block))
        finally:
            os.close(descriptor)
    return float("inf")


def _write(descriptor: int, block: mmap.mmap) -> int:
    count = sum(os.write(descriptor, block) for _ in range(_BLOCKS))
    os.fsync(descriptor)
    return count
