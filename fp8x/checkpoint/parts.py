"""`StoredMatrix`: a matrix of a checkpoint, read some rows at a time into a thread's buffer."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np

from fp8x.array import ScaledArray
from fp8x.checkpoint import exact, rows
from fp8x.checkpoint.finite import check_overflow, count_nonfinite, is_finite, nonfinite_error
from fp8x.checkpoint.fnuz import Translation
from fp8x.checkpoint.format import Format
from fp8x.checkpoint.packed import e2m1_error
from fp8x.checkpoint.reader import DTYPE_NAMES, DTYPES, Reader
from fp8x.checkpoint.threads import Threads
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """A matrix `[N, K]` as it lies in a file.

    Attributes:
        reader, name: where it is.
        scale, scheme: of its codes; None where it is in 16 or 32 bits.
        translation: how its codes come to the scheme's type, where they are in another.
    """

    reader: Reader
    name: str
    scale: np.ndarray | None = None
    scheme: Scheme | None = None
    translation: Translation | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.reader.stored(self.name).shape

    def parts(
        self, threads: Threads, *schemes: Scheme | None, use: str = "values"
    ) -> Iterator[tuple[slice, np.ndarray | ScaledArray]]:
        """Some rows at a time, in whole blocks of these schemes and its own: zeros beyond the end, which change no
        amax. Valid until the next.
        """
        (n, k), dtype = self.shape, DTYPES[self.reader.stored(self.name).dtype]
        for part in rows.chunks(n, k, self.scheme, *schemes):
            buffer = threads.buffer((part.stop - part.start) * k * dtype.itemsize, use)
            filled = (min(part.stop, n) - part.start) * k * dtype.itemsize
            self.reader.read_into(self.name, part.start * k * dtype.itemsize, buffer[:filled])
            buffer[filled:] = 0
            data = buffer.view(dtype).reshape(part.stop - part.start, k)
            if self.scheme is None:
                yield part, data
            else:
                if self.translation is not None:
                    data = self.translation.rows(part, data)
                yield part, ScaledArray(data, rows.scale_rows(self.scale, self.scheme, part), self.scheme)

    def whole_scale(self, threads: Threads, scheme: Scheme) -> jax.Array:
        """The scales of its values in a scheme whose blocks hold every row."""
        amax = np.zeros(scheme.scale_shape(self.shape), np.float32)
        for _, values in self.parts(threads, scheme):
            amax = np.maximum(amax, rows.block_amax(values, scheme))
        return self.scale_of_amax(threads, amax, scheme)

    def scale_of_amax(self, threads: Threads, amax: np.ndarray, scheme: Scheme) -> jax.Array:
        """The scales of its values in a scheme whose blocks hold every row, from the `amax` of these."""
        if self.scheme is None or not scheme.chooses_scales(self.scheme):
            return rows.compute_scale(amax, scheme)
        scales = rows.candidate_scales(amax, scheme)
        errors = [np.zeros_like(amax) for _ in scales]
        for _, values in self.parts(threads, scheme):
            errors = list(map(np.maximum, errors, rows.largest_errors(values, scales, scheme)))
        return rows.better_scale(scales, errors)


def quantized_matrix(
    format: Format, prefix: str, recipe: Recipe, reader: Reader, *, allow_nonfinite: bool = False
) -> tuple[StoredMatrix, np.ndarray | None]:
    """A matrix that a format stores by a recipe, and its static activation scale; errors as `Format.scales`."""
    name = f"{prefix}.weight"
    found = format.scales(prefix, recipe, reader.stored(name).shape, reader, allow_nonfinite=allow_nonfinite)
    return StoredMatrix(reader, name, found.scale, recipe.weight, found.translation), found.input_scale


def refuse_nonfinite(reader: Reader, name: str, threads: Threads) -> None:
    """Raises for a tensor that holds NaN or Inf, with their number in all of it."""
    tensor, count = reader.stored(name), 0
    step = tensor.step(rows.CHUNK_BYTES)
    for start in range(0, tensor.nbytes, step):
        buffer = threads.buffer(min(step, tensor.nbytes - start))
        reader.read_into(name, start, buffer)
        count += count_nonfinite(buffer, tensor.dtype)
    raise nonfinite_error(name, tensor.file, count, math.prod(tensor.shape))


def check_codes(matrix: StoredMatrix, values: ScaledArray, threads: Threads) -> None:
    """Refuses NaN and Inf among some of its codes, where no amax is computed in which they would show."""
    dtype = DTYPE_NAMES[values.data.dtype]
    # e2m1 has neither.
    if not matrix.reader.stored(matrix.name).is_packed and not is_finite(values.data, dtype):
        refuse_nonfinite(matrix.reader, matrix.name, threads)


def dequantized(
    matrix: StoredMatrix, values: ScaledArray, threads: Threads, dtype: np.dtype, *, allow_nonfinite: bool
) -> jax.Array:
    """The bits of some of its rows in 16 or 32 bits, in the thread's scratch memory, which the caller gives back.

    Raises:
        CheckpointError: without `allow_nonfinite`, codes that are NaN or Inf, or values that become so in this dtype.
    """
    if not allow_nonfinite:
        check_codes(matrix, values, threads)
    found = rows.dequantized(values, threads.scratch(values.shape, f"uint{8 * dtype.itemsize}"), dtype=dtype)
    if not allow_nonfinite:
        file = matrix.reader.stored(matrix.name).file
        check_overflow(matrix.name, file, np.from_dlpack(found), DTYPE_NAMES[dtype])
    return found


def warn_of_flushed(matrix: StoredMatrix, threads: Threads) -> None:
    """Warns of values that become zero where a matrix in 8 bits is dequantized (`exact.py`)."""
    if matrix.scheme is not None and exact.may_flush(matrix.scale, matrix.scheme):
        count = sum(exact.count_flushed(values) for _, values in matrix.parts(threads))
        exact.warn_of_flushed(matrix.name, count, math.prod(matrix.shape))


def not_e2m1(matrix: StoredMatrix, count: int) -> CheckpointError:
    """Says that a matrix in MX blocks can't be stored in 4 bits: so many of its codes are none of e2m1's."""
    file, (n, k) = matrix.reader.stored(matrix.name).file, matrix.shape
    return e2m1_error(f"{matrix.name} in {file}", count, n * k)
