"""The numbers of one tensor, some rows at a time: amax, what is not finite, and the energy of an error.

Maxima are those of bits, which numpy compares at the speed of the cache; so are sums of squares `np.einsum`'s, which
are 8 times as fast as XLA's on a CPU. Sums are made row by row, then over the rows in float64 in their order: the same
whatever the number of threads, and whether codes were stored or are made now.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import numpy as np

from fp8x.array import ScaledArray
from fp8x.checkpoint import rows
from fp8x.checkpoint.finite import extent
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
        bytes: of the values and their scales.
        amax: the largest finite magnitude, dequantized; None for what holds no floats.
        nonfinite: how many values are NaN or Inf.
        signal: sum of squares of the original; None without one.
        noise: sum of squares of the difference from it.
    """

    name: str
    scheme: Scheme | str
    shape: tuple[int, ...]
    bytes: int
    amax: float | None = None
    nonfinite: int = 0
    signal: float | None = None
    noise: float | None = None

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.scheme, Scheme)

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
    amax, nonfinite, signal, noise = 0.0, 0, None, None
    for values, truth in pairs:
        largest, count = _extent(values)
        amax, nonfinite = max(amax, largest), nonfinite + count
        if truth is not None:
            here = _energies(values, truth, threads)
            signal, noise = (signal or 0.0) + here[0], (noise or 0.0) + here[1]
    return dataclasses.replace(row, amax=amax, nonfinite=nonfinite, signal=signal, noise=noise)


def _extent(values: np.ndarray | ScaledArray) -> tuple[float, int]:
    """The largest finite magnitude, and how many values are not finite."""
    if not isinstance(values, ScaledArray):
        return extent(values, DTYPE_NAMES[values.dtype])
    tops = np.asarray(rows.block_tops(values))
    if np.isfinite(tops).all():
        return float(tops.max(initial=0)), 0
    return float(rows.finite_amax(values)), int(rows.count_nonfinite(values))


def _energies(
    values: np.ndarray | ScaledArray, truth: np.ndarray | ScaledArray, threads: Threads
) -> tuple[float, float]:
    """The sums of squares of the truth, and of the difference from it."""
    uses = ("truth", "difference")
    scratch = tuple(threads.scratch(values.shape, "float32", use) for use in uses)
    difference, truth = rows.differences(values, truth, scratch)
    for array, use in zip((truth, difference), uses):
        threads.keep_scratch(array, use)
    truth, difference = map(np.from_dlpack, (truth, difference))
    energies = _energy(truth), _energy(difference)
    if all(map(math.isfinite, energies)):
        return energies
    # What is not finite in the original has no error that could be measured.
    is_finite = np.isfinite(truth)
    return tuple(float(np.square(array[is_finite], dtype=np.float64).sum()) for array in (truth, difference))


def _energy(values: np.ndarray) -> float:
    return float(np.einsum("nk,nk->n", values, values).sum(dtype=np.float64))
