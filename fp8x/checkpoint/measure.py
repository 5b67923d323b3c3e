"""The numbers of one tensor, some rows at a time: amax, what is not finite, and how it compares with its original.

Maxima are those of bits, which numpy compares at the speed of the cache; `compare.py` has the rest.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import numpy as np

from fp8x.array import ScaledArray
from fp8x.checkpoint import rows
from fp8x.checkpoint.compare import Comparison
from fp8x.checkpoint.finite import extent
from fp8x.checkpoint.packed import MXFP4
from fp8x.checkpoint.parts import StoredMatrix
from fp8x.checkpoint.reader import DTYPE_NAMES, Reader
from fp8x.checkpoint.threads import Threads
from fp8x.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """One tensor, or the same matrix of several experts.

    Attributes:
        name: in the checkpoint; experts together have `*` for their number.
        scheme: a `Scheme`, or the stored type ("bf16") of what is not quantized.
        shape: `[N, K]` for a matrix, `[E, N, K]` for several experts' matrices.
        bytes: of the values and their scales, on disk.
        amax: the largest finite magnitude, dequantized; None for what holds no floats.
        nonfinite: how many values are NaN or Inf.
        signal: sum of squares of the original; None without one.
        noise: sum of squares of the difference from it.
        differing: how many values are not the original's, bit for bit in float32; None without one.
        blocks, exact_blocks: of a `Scheme`: how many there are, and in how many no value differs; None without an
            original.
        inexact_signal: the part of `signal` in the other blocks (all of it where there are no blocks, but a value
            differs); all of `noise` is theirs.
        is_packed: whether it is MXFP4 on disk, which `scheme` has the values of.
    """

    name: str
    scheme: Scheme | str
    shape: tuple[int, ...]
    bytes: int
    amax: float | None = None
    nonfinite: int = 0
    signal: float | None = None
    noise: float | None = None
    differing: int | None = None
    blocks: int | None = None
    exact_blocks: int | None = None
    inexact_signal: float | None = None
    is_packed: bool = False

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.scheme, Scheme)

    @property
    def stored_as(self) -> str:
        """What tables call its scheme or type."""
        return MXFP4 if self.is_packed else str(self.scheme)

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def snr(self) -> float | None:
        """Signal-to-noise ratio in dB, where the original is finite; None without an original."""
        return None if self.signal is None else rows.decibels(self.signal, self.noise)


def extended(row: TensorRow, reader: Reader, threads: Threads) -> TensorRow:
    """`row` with its amax and what is not finite, of a tensor of any shape in 16 or 32 bits."""
    tensor, amax, nonfinite = reader.stored(row.name), 0.0, 0
    step = tensor.step(rows.CHUNK_BYTES)
    for start in range(0, tensor.nbytes, step):
        buffer = threads.buffer(min(step, tensor.nbytes - start))
        reader.read_into(row.name, start, buffer)
        largest, count = extent(buffer, tensor.dtype)
        amax, nonfinite = max(amax, largest), nonfinite + count
    return dataclasses.replace(row, amax=amax, nonfinite=nonfinite)


def measured(row: TensorRow, matrix: StoredMatrix, truth: StoredMatrix | None, threads: Threads) -> TensorRow:
    """`row` with its numbers; signal and noise where there is a `truth`."""
    if truth is None:
        return _summed(row, ((values, None) for _, values in matrix.parts(threads)), threads)
    pairs = zip(matrix.parts(threads, truth.scheme), truth.parts(threads, matrix.scheme, use="truth"), strict=True)
    return _summed(row, ((values, true) for (_, values), (_, true) in pairs), threads)


def measured_by_scheme(row: TensorRow, matrix: StoredMatrix, threads: Threads) -> TensorRow:
    """`row` with the numbers of a matrix in 16 or 32 bits as its scheme would store it."""
    scale = None if row.scheme.block[0] is not None else matrix.whole_scale(threads, row.scheme)

    def quantized(values: np.ndarray) -> ScaledArray:
        scratch = threads.scratch(values.shape)
        if scale is not None:
            data = rows.quantized_with_scale(values, scale, scratch, scheme=row.scheme)
            return _scaled(data, scale, row.scheme)
        data, own_scale, top = rows.quantized(values, scratch, scheme=row.scheme)
        if not np.isfinite(top).all():
            data, own_scale = rows.quantized_finite(values, data, scheme=row.scheme)
        return _scaled(data, own_scale, row.scheme)

    return _summed(row, ((quantized(values), values) for _, values in matrix.parts(threads, row.scheme)), threads)


def _scaled(data: jax.Array, scale: jax.Array, scheme: Scheme) -> ScaledArray:
    """Around codes that came as bytes."""
    return ScaledArray(np.from_dlpack(data).view(scheme.dtype), scale, scheme)


Pair = tuple[np.ndarray | ScaledArray, np.ndarray | ScaledArray | None]  # values, and what they should be


def _summed(row: TensorRow, pairs: Iterable[Pair], threads: Threads) -> TensorRow:
    amax, nonfinite, found = 0.0, 0, None
    for values, truth in pairs:
        largest, count = _extent(values)
        amax, nonfinite = max(amax, largest), nonfinite + count
        if truth is not None:
            found = found or Comparison(row.scheme if row.is_quantized else None, row.shape)
            found.add(values, truth, threads)
    row = dataclasses.replace(row, amax=amax, nonfinite=nonfinite)
    if found is None:
        return row
    names = ("signal", "noise", "differing", "blocks", "exact_blocks", "inexact_signal")
    return dataclasses.replace(row, **{name: getattr(found, name) for name in names})


def _extent(values: np.ndarray | ScaledArray) -> tuple[float, int]:
    """The largest finite magnitude, and how many values are not finite."""
    if not isinstance(values, ScaledArray):
        return extent(values, DTYPE_NAMES[values.dtype])
    tops = np.asarray(rows.block_tops(values))
    if np.isfinite(tops).all():
        return float(tops.max(initial=0)), 0
    return float(rows.finite_amax(values)), int(rows.count_nonfinite(values))
