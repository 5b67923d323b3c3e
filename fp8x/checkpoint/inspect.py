"""`inspect`: what a Hugging Face directory holds, tensor by tensor, and how far quantization took it."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from fp8x.checkpoint import Format, format_of, measure
from fp8x.checkpoint.header import DTYPES, FLOAT8
from fp8x.checkpoint.measure import TensorRow
from fp8x.checkpoint.names import natural
from fp8x.checkpoint.parts import StoredMatrix, quantized_matrix
from fp8x.checkpoint.reader import Reader
from fp8x.checkpoint.rows import decibels, mean_decibels
from fp8x.checkpoint.threads import Threads
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe, Rules, as_recipe
from fp8x.scheme import Scheme

FLOATS = ("F32", "F16", "BF16")


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
        """`mean_decibels` of the quantized tensors."""
        return mean_decibels(row.snr for row in self.rows)

    @property
    def exactness(self) -> "Exactness | None":
        """Over all matrices that were compared with an original; None without any."""
        return exactness(self.rows)


@dataclasses.dataclass(frozen=True)
class Exactness:
    """How much of its original a checkpoint keeps bit for bit; prints as a sentence.

    Attributes:
        values, differing: how many were compared (of matrices that are in 8 bits before, after, or both), and how many
            of them are not the original's.
        blocks, exact_blocks: how many there are in matrices in 8 bits, and in how many no value differs.
        signal, noise: sums of squares of the original, and of the difference from it, over blocks in which a value
            differs, and over dequantized matrices in which one does.
    """

    values: int
    differing: int
    blocks: int
    exact_blocks: int
    signal: float
    noise: float

    @property
    def snr(self) -> float | None:
        """Signal-to-noise ratio in dB where something was lost; None where nothing was."""
        return decibels(self.signal, self.noise) if self.differing else None

    def to_json(self) -> dict[str, float | None]:
        named = {name: getattr(self, name) for name in ("values", "differing", "blocks", "exact_blocks")}
        return named | {"inexact_snr_db": self.snr}

    def __str__(self) -> str:
        if not self.differing:
            return f"nothing was lost: every one of {self.values:,} values is the source's, bit for bit"
        lost = f"{self.differing:,} of {self.values:,} values differ from the source's"
        if not self.blocks:
            return f"{lost}, at {self.snr:.1f} dB"
        return f"{self.exact_blocks:,} of {self.blocks:,} blocks are exact; {lost}, in blocks at {self.snr:.1f} dB"


def exactness(rows: Iterable[TensorRow]) -> Exactness | None:
    """Over those rows that were compared with an original; None without any."""
    known = [row for row in rows if row.differing is not None]
    if not known:
        return None
    return Exactness(
        sum(row.size for row in known),
        sum(row.differing for row in known),
        sum(row.blocks or 0 for row in known),
        sum(row.exact_blocks or 0 for row in known),
        sum(row.inexact_signal for row in known),
        sum(row.noise for row in known),
    )


def inspect(
    path: str | Path,
    *,
    reference: str | Path | None = None,
    recipe: Recipe | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Every tensor of a checkpoint; any model, since only the files and their format count.

    Memory holds some rows for each core, whatever the size of the checkpoint or of its largest tensor.

    Arguments:
        path: the directory.
        reference: the checkpoint that `path` was made from: gives what was quantized or dequantized its SNR. What is in
            8 bits there counts with its dequantized values.
        recipe: for an unquantized checkpoint: shows what this recipe would make of it.
        progress: called after every tensor with the bytes read and the bytes in all, from several threads but one at a
            time.

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
    names = sorted((name for name in reader if name not in scales), key=natural)
    threads = Threads(progress, 0, sum(reader.stored(name).nbytes for name in names))

    def row(name: str) -> TensorRow:
        chosen = recipes.get(name.removesuffix(".weight"))
        if chosen is None:
            found = _plain_row(name, reader, original, threads)
        elif format is None:
            found = _row_of_recipe(name, chosen.weight, reader, threads)
        else:
            found = _quantized_row(name, chosen, reader, format, original, threads)
        threads.advance(reader.stored(name).nbytes)
        return found

    rows = threads.run(functools.partial(row, name) for name in names)
    return Inspection(None if format is None else format.name, rows)


def merge_experts(rows: Iterable[TensorRow]) -> list[TensorRow]:
    """The rows with the matrices of a layer's experts in one: bytes summed, the largest amax, SNR over all of them."""
    groups: dict[str, list[TensorRow]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"(\.experts)\.\d+\.", r"\1.*.", row.name), []).append(row)
    return [group[0] if len(group) == 1 else _merged(name, group) for name, group in groups.items()]


def _merged(name: str, rows: list[TensorRow]) -> TensorRow:
    schemes, shapes = dict.fromkeys(row.scheme for row in rows), {row.shape for row in rows}
    numbers = ("signal", "noise", "differing", "blocks", "exact_blocks", "inexact_signal")
    return TensorRow(
        name,
        rows[0].scheme if len(schemes) == 1 else " | ".join(map(str, schemes)),
        (len(rows), *rows[0].shape) if len(shapes) == 1 else (sum(row.size for row in rows),),
        sum(row.bytes for row in rows),
        max((row.amax for row in rows if row.amax is not None), default=None),
        sum(row.nonfinite for row in rows),
        **{name: _sum(getattr(row, name) for row in rows) for name in numbers},
        is_packed=all(row.is_packed for row in rows),
    )


def _sum(numbers: Iterable[float | None]) -> float | None:
    """None where one is not known."""
    known = list(numbers)
    return None if None in known else sum(known)


class _Reference:
    """The checkpoint to compare with."""

    def __init__(self, path: str | Path):
        self.reader = Reader(path)
        self._format = format_of(self.reader.config)
        self._recipes = _recipes(self.reader, self._format, None)

    def recipe(self, name: str) -> Recipe | None:
        """The recipe of a matrix that is quantized there."""
        return self._recipes.get(name.removesuffix(".weight"))

    def matrix(self, name: str, shape: tuple[int, int]) -> StoredMatrix:
        recipe = self.recipe(name)
        if recipe is None:
            self.reader.check(name, shapes=[shape], dtypes=FLOATS)
            return StoredMatrix(self.reader, name)
        if self.reader.stored(name).shape != shape:
            found = list(self.reader.stored(name).shape)
            raise CheckpointError(f"reference: {name} in {self.reader.path} is {found}, not {list(shape)}")
        return quantized_matrix(self._format, name.removesuffix(".weight"), recipe, self.reader)[0]


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


def _quantized_row(
    name: str, recipe: Recipe, reader: Reader, format: Format, original: _Reference | None, threads: Threads
) -> TensorRow:
    prefix = name.removesuffix(".weight")
    matrix, _ = quantized_matrix(format, prefix, recipe, reader)
    tensors = format.names(prefix, recipe, matrix.shape, reader)
    size = sum(reader.stored(tensor).nbytes_on_disk for tensor in tensors)
    row = TensorRow(name, recipe.weight, matrix.shape, size, is_packed=reader.stored(name).is_packed)
    truth = None if original is None else original.matrix(name, matrix.shape)
    return measure.measured(row, matrix, truth, threads)


def _plain_row(name: str, reader: Reader, original: _Reference | None, threads: Threads) -> TensorRow:
    tensor = reader.stored(name)
    row = TensorRow(name, tensor.dtype.lower(), tensor.shape, tensor.nbytes_on_disk, is_packed=tensor.is_packed)
    if tensor.dtype not in FLOATS:
        return row
    if original is not None and original.recipe(name) is not None:
        return measure.measured(row, StoredMatrix(reader, name), original.matrix(name, tensor.shape), threads)
    return measure.extended(row, reader, threads)


def _row_of_recipe(name: str, scheme: Scheme, reader: Reader, threads: Threads) -> TensorRow:
    shape = reader.stored(name).shape
    scheme.check_shape(shape, name)
    size = math.prod(shape) + math.prod(scheme.scale_shape(shape)) * scheme.scale_dtype.itemsize
    return measure.measured_by_scheme(TensorRow(name, scheme, shape, size), StoredMatrix(reader, name), threads)
