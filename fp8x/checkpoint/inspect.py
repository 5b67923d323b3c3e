"""`inspect`: what a Hugging Face directory holds, tensor by tensor, and how far quantization took it."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.checkpoint import Format, format_of
from fp8x.checkpoint.header import DTYPES, FLOAT8
from fp8x.checkpoint.reader import Reader
from fp8x.checkpoint.rows import block_amax, decibels, scale_rows
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe, Rules, as_recipe
from fp8x.scheme import Scheme

FLOATS = ("F32", "F16", "BF16")
CHUNK = 2**20  # values at a time


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
        """Signal-to-noise ratio in dB; None without an original."""
        return None if self.signal is None else decibels(self.signal, self.noise)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a directory holds.

    Attributes:
        format: the name of its quantized format, None for an unquantized checkpoint.
        rows: its tensors by name, numbers in their order. The scales of a matrix are in its row.
    """

    format: str | None
    rows: list[TensorRow]

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def mean_snr(self) -> float | None:
        """The mean over the quantized tensors that have one; those without any error are left out."""
        found = [row.snr for row in self.rows if row.snr is not None and row.snr != math.inf]
        return sum(found) / len(found) if found else None


def inspect(
    path: str | Path,
    *,
    reference: str | Path | None = None,
    recipe: Recipe | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Every tensor of a checkpoint, some rows at a time; any model, since only the files and their format count.

    Arguments:
        path: the directory.
        reference: the checkpoint that `path` was made from: gives what was quantized or dequantized its SNR. What is in
            8 bits there counts with its dequantized values.
        recipe: for an unquantized checkpoint: shows what this recipe would make of it.
        progress: called after every tensor with the bytes read and the bytes in all.

    Raises:
        CheckpointError: a damaged checkpoint; a reference that holds other tensors; a recipe for what is quantized
            already.
    """
    reader = Reader(path)
    format = format_of(reader.config)
    original = None if reference is None else _Reference(reference)
    if format is not None and recipe is not None:
        raise CheckpointError(f"recipe: {reader.path} is quantized already ({format.name}); leave the recipe out")
    recipes = _recipes(reader, format, recipe)
    scales: set[str] = set()
    if format is not None:
        for prefix, chosen in recipes.items():
            scales.update(format.names(prefix, chosen, reader.stored(f"{prefix}.weight").shape, reader)[1:])
    names = sorted((name for name in reader if name not in scales), key=_natural)
    rows, done, total = [], 0, sum(reader.stored(name).nbytes for name in names)
    for name in names:
        chosen = recipes.get(name.removesuffix(".weight"))
        if chosen is None:
            rows.append(_plain_row(name, reader, original))
        elif format is None:
            rows.append(_row_of_recipe(name, chosen.weight, reader))
        else:
            rows.append(_quantized_row(name, chosen, reader, format, original))
        done += reader.stored(name).nbytes
        if progress is not None:
            progress(done, total)
    return Inspection(None if format is None else format.name, rows)


def merge_experts(rows: Iterable[TensorRow]) -> list[TensorRow]:
    """The rows with the matrices of a layer's experts in one: bytes summed, the largest amax, SNR over all of them."""
    groups: dict[str, list[TensorRow]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"(\.experts)\.\d+\.", r"\1.*.", row.name), []).append(row)
    return [group[0] if len(group) == 1 else _merged(name, group) for name, group in groups.items()]


def _merged(name: str, rows: list[TensorRow]) -> TensorRow:
    schemes, shapes = dict.fromkeys(row.scheme for row in rows), {row.shape for row in rows}
    known = all(row.signal is not None for row in rows)
    return TensorRow(
        name,
        rows[0].scheme if len(schemes) == 1 else " | ".join(map(str, schemes)),
        (len(rows), *rows[0].shape) if len(shapes) == 1 else (sum(row.size for row in rows),),
        sum(row.bytes for row in rows),
        max((row.amax for row in rows if row.amax is not None), default=None),
        sum(row.nonfinite for row in rows),
        sum(row.signal for row in rows) if known else None,
        sum(row.noise for row in rows) if known else None,
    )


Part = Callable[[slice], np.ndarray | ScaledArray]  # some rows of a matrix, in whole blocks


class _Reference:
    """The checkpoint to compare with."""

    def __init__(self, path: str | Path):
        self.reader = Reader(path)
        self._format = format_of(self.reader.config)
        self._recipes = _recipes(self.reader, self._format, None)

    def recipe(self, name: str) -> Recipe | None:
        """The recipe of a matrix that is quantized there."""
        return self._recipes.get(name.removesuffix(".weight"))

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[Part, int | None]:
        """Its rows, and how many of them are in a block."""
        if (recipe := self.recipe(name)) is None:
            return _values(self.reader, name, shape).__getitem__, None
        if self.reader.stored(name).shape != shape:
            found = list(self.reader.stored(name).shape)
            raise CheckpointError(f"reference: {name} in {self.reader.path} is {found}, not {list(shape)}")
        weight, _ = self._format.decode(name.removesuffix(".weight"), recipe, shape, self.reader)
        return _part(weight)


def _part(weight: ScaledArray) -> tuple[Part, int | None]:
    block = _block_rows(weight.shape, weight.scheme)

    def part(rows: slice) -> ScaledArray:
        return ScaledArray(weight.data[rows], scale_rows(weight.scale, weight.scheme, rows), weight.scheme)

    return part, block


def _recipes(reader: Reader, format: Format | None, recipe: Recipe | str | None) -> dict[str, Recipe]:
    """By prefix, of the matrices that are quantized, or would be."""
    types = FLOATS if format is None else FLOAT8
    tensors = {name.removesuffix(".weight"): reader.stored(name) for name in reader if name.endswith(".weight")}
    prefixes = [prefix for prefix, tensor in tensors.items() if len(tensor.shape) == 2 and tensor.dtype in types]
    if format is None:
        recipes = Rules(None if recipe is None else as_recipe(recipe)).resolve(prefixes)
    else:
        recipes = format.recipes(reader, prefixes, DTYPES["BF16"])
    return {prefix: chosen for prefix, chosen in recipes.items() if chosen is not None}


def _quantized_row(name: str, recipe: Recipe, reader: Reader, format: Format, original: _Reference | None) -> TensorRow:
    prefix, shape = name.removesuffix(".weight"), reader.stored(name).shape
    weight, _ = format.decode(prefix, recipe, shape, reader)
    tensors = format.names(prefix, recipe, shape, reader)
    row = TensorRow(name, weight.scheme, shape, sum(reader.stored(tensor).nbytes for tensor in tensors))
    row = _compared(row, *_part(weight), shape, reader, original)
    for tensor in tensors:
        reader.release(tensor)
    return row


def _plain_row(name: str, reader: Reader, original: _Reference | None) -> TensorRow:
    tensor = reader.stored(name)
    row = TensorRow(name, tensor.dtype.lower(), tensor.shape, tensor.nbytes)
    if tensor.dtype not in FLOATS:
        return row
    values = _values(reader, name, tensor.shape)
    if original is not None and original.recipe(name) is not None:
        return _compared(row, values.__getitem__, None, tensor.shape, reader, original)
    values = values.reshape(-1)
    return _measured(row, values.__getitem__, (values.size, 1), None, None, [reader])


def _compared(
    row: TensorRow,
    part: Part,
    block: int | None,
    shape: tuple[int, int],
    reader: Reader,
    original: _Reference | None,
) -> TensorRow:
    if original is None:
        return _measured(row, part, shape, block, None, [reader])
    truth, other = original.part(row.name, shape)
    return _measured(row, part, shape, math.lcm(block or 1, other or 1), truth, [reader, original.reader])


def _row_of_recipe(name: str, scheme: Scheme, reader: Reader) -> TensorRow:
    shape = reader.stored(name).shape
    scheme.check_shape(shape, name)
    values, block, scale = _values(reader, name, shape), _block_rows(shape, scheme), None
    if block is None:
        amax = np.zeros(scheme.scale_shape(shape), np.float32)
        for rows in _chunks(shape, block):
            amax = np.maximum(amax, block_amax(values[rows], scheme))
            _release(reader, name, rows, shape[1])
        scale = numerics.compute_scale(jnp.asarray(amax), scheme)
    size = math.prod(shape) + math.prod(scheme.scale_shape(shape)) * scheme.scale_dtype.itemsize
    row = TensorRow(name, scheme, shape, size)
    return _measured(
        row, lambda rows: _quantize(values[rows], scale, scheme), shape, block, values.__getitem__, [reader]
    )


def _values(reader: Reader, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return reader.read(name, shapes=[shape], dtypes=FLOATS)


def _block_rows(shape: tuple[int, int], scheme: Scheme) -> int | None:
    """The rows of a block; None where all rows are in one."""
    return None if scheme.scale_shape(shape)[0] == 1 else scheme.block_of(shape)[0]


def _chunks(shape: tuple[int, int], block: int | None) -> Iterator[slice]:
    """Rows at a time, in whole blocks."""
    (n, k), whole = shape, block or 1
    step = whole * max(1, CHUNK // (max(k, 1) * whole))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _measured(
    row: TensorRow,
    part: Part,
    shape: tuple[int, int],
    block: int | None,
    truth: Part | None,
    readers: list[Reader],
) -> TensorRow:
    """`row` with its numbers. `part` gives its values `[N, K]`; `readers` hold them, and `truth`."""
    amax, sums = 0.0, np.zeros(1 if truth is None else 3)
    for rows in _chunks(shape, block):
        top, *more = _reduce(part(rows), None if truth is None else truth(rows))
        amax, sums = max(amax, float(top)), sums + np.array(more, np.float64)
        for reader in readers:
            _release(reader, row.name, rows, shape[1])
    nonfinite, *energies = sums.tolist()
    signal, noise = energies or (None, None)
    return dataclasses.replace(row, amax=amax, nonfinite=int(nonfinite), signal=signal, noise=noise)


def _release(reader: Reader, name: str, rows: slice, k: int) -> None:
    """Lets go of some rows of `k` values."""
    width = k * DTYPES[reader.stored(name).dtype].itemsize
    reader.release(name, rows.start * width, rows.stop * width)


@functools.partial(jax.jit, static_argnames="scheme")
def _quantize(values: Array, scale: Array | None, scheme: Scheme) -> ScaledArray:
    if scale is None:
        return numerics.quantize(values, scheme)
    return numerics.quantize_with_scale(values, scale, scheme)


@jax.jit
def _reduce(values: Array | ScaledArray, truth: Array | ScaledArray | None) -> tuple[Array, ...]:
    values = _float32(values)
    finite = jnp.isfinite(values)
    extent = jnp.max(jnp.where(finite, jnp.abs(values), 0), initial=0), jnp.sum(~finite)
    if truth is None:
        return extent
    truth = _float32(truth)
    return *extent, jnp.sum(truth**2), jnp.sum((values - truth) ** 2)


def _float32(values: Array | ScaledArray) -> Array:
    return values.dequantize() if isinstance(values, ScaledArray) else values.astype(jnp.float32)


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """A sort key that puts layer 10 after layer 9."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", name)]
