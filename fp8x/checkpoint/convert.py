"""Checkpoint to checkpoint: no model is built, and memory holds some rows of a few matrices, whatever their size.

Each matrix is read into a buffer, quantized there some rows at a time, in a core's cache, and written to its place at
once, by one thread a core: nobody waits for a reader or a writer.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fp8x.array import ScaledArray
from fp8x.checkpoint import rows
from fp8x.checkpoint.destination import DEFAULT_SHARD_BYTES, check_source
from fp8x.checkpoint.finite import count_nonfinite, is_finite, nonfinite_error
from fp8x.checkpoint.format import Format, Layout
from fp8x.checkpoint.header import UNQUANTIZED, nbytes
from fp8x.checkpoint.parts import StoredMatrix
from fp8x.checkpoint.reader import CONFIG, DTYPE_NAMES, Reader
from fp8x.checkpoint.resumable import ResumableWriter
from fp8x.checkpoint.threads import Threads
from fp8x.errors import CalibrationError, CheckpointError, some
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme
from fp8x.version import __version__

Spec = tuple[str, tuple[int, ...]]  # dtype by safetensors' name, shape


@dataclasses.dataclass(frozen=True)
class Target:
    """What becomes of one matrix `[N, K]`.

    Attributes:
        stored: its recipe in the source; None where it is in 16 or 32 bits there.
        recipe: its recipe in the destination; None for 16 or 32 bits.
        input_scale: the static activation scale, float32 `[1, groups]`, if it was calibrated.
    """

    stored: Recipe | None
    recipe: Recipe | None
    input_scale: np.ndarray | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the matrix's bytes stay as they are."""
        if self.stored is None or self.recipe is None:
            return self.stored is self.recipe
        # Another scale rule makes other scales.
        return self.stored.weight == self.recipe.weight

    @property
    def needs_calibration(self) -> bool:
        """Whether the destination holds a static activation scale that neither calibration nor the source gives."""
        if self.input_scale is not None or self.recipe is None or not self.recipe.needs_calibration:
            return False
        stored = self.stored
        return stored is None or not stored.is_static or not _stores_alike(stored.activation, self.recipe.activation)


def _stores_alike(a: Scheme, b: Scheme) -> bool:
    return (a.element, a.block, a.scale_dtype) == (b.element, b.block, b.scale_dtype)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        format: of the destination; None where nothing there is quantized.
        bytes_read: of the source's matrices and other tensors, in this run.
        bytes_written: of all tensors of the destination.
        bytes_resumed: of those, what an earlier run, which was killed, had finished.
        seconds: it took.
    """

    format: str | None
    bytes_read: int
    bytes_written: int
    bytes_resumed: int
    seconds: float


def convert_tensors(
    reader: Reader,
    path: str | Path,
    targets: Mapping[str, Target],
    config: Mapping[str, Any],
    *,
    source_format: Format | None,
    format: Format | None,
    out_dtype: np.dtype,
    dropped: Iterable[str] = (),
    added: Mapping[str, np.ndarray] | None = None,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes a checkpoint with every matrix as `targets` says; all other tensors are copied.

    Arguments:
        reader: the source.
        path: the directory to make.
        targets: by prefix, of every matrix that is quantized in the source or will be.
        config: the destination's config.json.
        source_format, format: of source and destination; None where nothing is quantized.
        out_dtype: of matrices that are dequantized.
        dropped: tensors that are left out.
        added: further tensors, small ones, by name.
        allow_nonfinite: accept tensors, and scales of matrices, that hold NaN or Inf.
        max_shard_bytes, beside: as `fp8x.save` has them.
        progress: is called with the bytes read and the bytes in all.

    Raises:
        CheckpointError: a damaged source, NaN or Inf in a tensor, or a destination that can't be written.
        CalibrationError: static activation scales that nobody knows.
        ShapeError: a matrix that its scheme does not fit.
    """
    start = time.monotonic()
    check_source(reader.path, Path(path))
    if lacking := [prefix for prefix, target in targets.items() if target.needs_calibration]:
        raise CalibrationError(
            f"{some(lacking)} have static activation scales, which are found by calibration: give those that "
            "fp8x.calibrate found, or take a recipe with dynamic activation scales"
        )
    # Files are filled in this order, so that they are finished one after the other.
    jobs = _ordered(_jobs(reader, targets, set(dropped), source_format, format, out_dtype, allow_nonfinite))
    jobs = [*(_Addition(name, array) for name, array in (added or {}).items()), *jobs]
    specs = {name: spec for job in jobs for name, spec in job.specs.items()}
    identity = [
        [__version__, version("jax"), version("jaxlib")],
        reader.identity,
        [config, beside, str(out_dtype), allow_nonfinite],
        [(prefix, *map(repr, (t.stored, t.recipe)), _hex(t.input_scale)) for prefix, t in targets.items()],
        [(name, _hex(array)) for name, array in (added or {}).items()],
    ]
    name, total = None if format is None else format.name, sum(job.bytes for job in jobs)
    unfinished = ResumableWriter(path, specs, identity, max_shard_bytes=max_shard_bytes)
    if unfinished.is_complete:
        unfinished.tidy()
        if progress is not None:
            progress(total, total)
        return Conversion(name, 0, unfinished.bytes, unfinished.bytes, time.monotonic() - start)
    with unfinished as writer:
        todo = [job for job in jobs if not all(map(writer.has, job.specs))]
        work = _Work(writer, progress, total - sum(job.bytes for job in todo), total)
        resumed = sum(nbytes(*spec) for name, spec in specs.items() if writer.has(name))
        work.run(functools.partial(job.run, work) for job in todo)
        writer.add_json(CONFIG, config)
        for name, value in (beside or {}).items():
            writer.add_json(name, value)
        writer.copy_companions(reader.path)
    read = sum(job.bytes for job in todo)
    return Conversion(name, read, writer.bytes, resumed, time.monotonic() - start)


def _jobs(
    reader: Reader,
    targets: Mapping[str, Target],
    dropped: set[str],
    source_format: Format | None,
    format: Format | None,
    out_dtype: np.dtype,
    allow_nonfinite: bool,
) -> Iterator["_Copy | _Matrix"]:
    """In the order in which the source's bytes lie."""
    matrices = {f"{prefix}.weight": prefix for prefix in targets}
    for prefix, target in targets.items():
        shape = _matrix_shape(reader, f"{prefix}.weight")
        if target.stored is not None:
            dropped.update(source_format.names(prefix, target.stored, shape, reader))
        if target.recipe is not None:
            target.recipe.weight.check_shape(shape, f"{prefix}.weight")
    for name in sorted(reader, key=lambda name: (str(reader.stored(name).file), reader.stored(name).start)):
        target = targets.get(matrices.get(name))
        if target is not None and not (target.stored is target.recipe is None):
            recipe = target.recipe
            layout = None if recipe is None else format.layout(recipe, reader.stored(name).shape)
            yield _Matrix(reader, matrices[name], target, source_format, layout, out_dtype, allow_nonfinite)
        elif name not in dropped:
            yield _Copy(reader, name, allow_nonfinite)


def _ordered(jobs: Iterable["_Copy | _Matrix"]) -> list["_Copy | _Matrix"]:
    """So that the work begins at once: one matrix, for which JAX starts and compiles; meanwhile copies, which need no
    JAX; one matrix of each other shape, so that no program is compiled twice; and the rest.
    """
    first: dict[Any, _Matrix] = {}
    copies, rest = [], []
    for job in jobs:
        if isinstance(job, _Copy):
            copies.append(job)
        elif job.program in first:
            rest.append(job)
        else:
            first[job.program] = job
    leaders = list(first.values())
    return [*leaders[:1], *copies, *leaders[1:], *rest]


def _matrix_shape(reader: Reader, name: str) -> tuple[int, int]:
    tensor = reader.stored(name)
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{name} in {tensor.file}: shape is {list(tensor.shape)}, expected a matrix [N, K]")
    return tensor.shape


@dataclasses.dataclass(frozen=True, eq=False)
class _Addition:
    """A tensor that the source does not hold so."""

    name: str
    array: np.ndarray
    bytes: int = 0  # of the source

    @property
    def specs(self) -> dict[str, Spec]:
        return {self.name: (DTYPE_NAMES[self.array.dtype], self.array.shape)}

    def run(self, work: "_Work") -> None:
        work.writer.write(self.name, 0, self.array)


@dataclasses.dataclass(frozen=True)
class _Copy:
    """A tensor that stays as it is."""

    reader: Reader
    name: str
    allow_nonfinite: bool

    @property
    def specs(self) -> dict[str, Spec]:
        tensor = self.reader.stored(self.name)
        return {self.name: (tensor.dtype, tensor.shape)}

    @property
    def bytes(self) -> int:
        return self.reader.stored(self.name).nbytes

    def run(self, work: "_Work") -> None:
        dtype = self.reader.stored(self.name).dtype
        for start in range(0, self.bytes, rows.CHUNK_BYTES):
            buffer = work.buffer(min(rows.CHUNK_BYTES, self.bytes - start))
            self.reader.read_into(self.name, start, buffer)
            if not self.allow_nonfinite and not is_finite(buffer, dtype):
                _refuse(self.reader, self.name, work)
            work.writer.write(self.name, start, buffer)
            work.advance(buffer.size)


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A matrix that is quantized in the source, in the destination, or in both."""

    reader: Reader
    prefix: str
    target: Target
    source_format: Format | None
    layout: Layout | None  # in the destination; None where it is in 16 or 32 bits there
    out_dtype: np.dtype
    allow_nonfinite: bool

    @property
    def name(self) -> str:
        return f"{self.prefix}.weight"

    @property
    def specs(self) -> dict[str, Spec]:
        if self.layout is None:
            return {self.name: (DTYPE_NAMES[self.out_dtype], self.reader.stored(self.name).shape)}
        parts = (self.layout.weight, self.layout.weight_scale, self.layout.input_scale)
        return {self.prefix + part.suffixes[0]: (part.dtypes[0], part.shapes[0]) for part in parts if part is not None}

    @property
    def bytes(self) -> int:
        return self.reader.stored(self.name).nbytes

    @property
    def program(self) -> tuple:
        """What tells compiled programs apart."""
        (n, k), target = self.reader.stored(self.name).shape, self.target
        schemes = [recipe and recipe.weight for recipe in (target.stored, target.recipe)]
        part = next(rows.chunks(n, k, *schemes), slice(0, 0))
        return self.reader.stored(self.name).dtype, *schemes, part.stop - part.start, k

    def run(self, work: "_Work") -> None:
        """Reads rows, and writes what becomes of them."""
        stored, scheme = self._read(), self.target.recipe and self.target.recipe.weight
        if self.layout is not None and self.layout.input_scale is not None:
            for name, array in self.layout.input_scale.write(self.prefix, self._input_scale(stored)).items():
                work.writer.write(name, 0, array)
        if scheme is None:
            for part, values in self._parts(work, stored):
                scratch = work.scratch(values.shape, f"uint{8 * self.out_dtype.itemsize}")
                self._check_codes(work, values)
                self._write_result(work, part, rows.dequantized(values, scratch, dtype=self.out_dtype))
        elif self.target.is_kept:
            self._write_scale(work, 0, stored.scale)
            for part, values in self._parts(work, stored):
                self._check_codes(work, values)
                self._write(work, part, values.data)
        elif scheme.block[0] is None:
            self._convert_whole(work, stored, scheme)
        else:
            for part, values in self._parts(work, stored, scheme):
                data, scale, top = rows.quantized(values, work.scratch(values.shape), scheme=scheme)
                if not np.isfinite(top).all():
                    self._check_nonfinite(work, stored)
                    data, scale = rows.quantized_finite(values, data, scheme=scheme)
                self._write_result(work, part, data)
                self._write_scale(work, part.start // scheme.block[0], scale)

    def _convert_whole(self, work: "_Work", stored: "_Stored", scheme: Scheme) -> None:
        """To blocks that hold every row: their scales before their values."""
        scale = rows.compute_scale(self._amax(work, stored, scheme), scheme)
        self._write_scale(work, 0, scale)
        for part, values in self._parts(work, stored, scheme):
            data = rows.quantized_with_scale(values, scale, work.scratch(values.shape), scheme=scheme)
            self._write_result(work, part, data)

    def _read(self) -> "_Stored":
        tensor, recipe = self.reader.stored(self.name), self.target.stored
        if recipe is None:
            self.reader.check(self.name, shapes=[tensor.shape], dtypes=UNQUANTIZED)
            return _Stored()
        scale, input_scale = self.source_format.scales(
            self.prefix, recipe, tensor.shape, self.reader, allow_nonfinite=self.allow_nonfinite
        )
        return _Stored(scale, recipe.weight, input_scale)

    def _parts(
        self, work: "_Work", stored: "_Stored", scheme: Scheme | None = None
    ) -> Iterator[tuple[slice, np.ndarray | ScaledArray]]:
        """Some rows at a time, in whole blocks."""
        matrix = StoredMatrix(self.reader, self.name, stored.scale, stored.scheme)
        return matrix.parts(work, scheme)

    def _amax(self, work: "_Work", stored: "_Stored", scheme: Scheme) -> np.ndarray:
        """Of blocks that hold every row."""
        found = np.zeros(scheme.scale_shape(self.reader.stored(self.name).shape), np.float32)
        for _, values in self._parts(work, stored, scheme):
            amax = np.asarray(rows.block_max(values, scheme))
            if not np.isfinite(amax).all():
                self._check_nonfinite(work, stored)
                amax = rows.block_amax(values, scheme)
            found = np.maximum(found, amax)
        return found

    def _check_nonfinite(self, work: "_Work", stored: "_Stored") -> None:
        if self.allow_nonfinite:
            return
        tensor = self.reader.stored(self.name)
        count = sum(int(rows.count_nonfinite(values)) for _, values in self._parts(work, stored))
        raise nonfinite_error(self.name, tensor.file, count, math.prod(tensor.shape))

    def _check_codes(self, work: "_Work", values: ScaledArray) -> None:
        """Refuses NaN and Inf among codes from which no amax is computed, in which they would show."""
        if not self.allow_nonfinite and not is_finite(values.data, self.reader.stored(self.name).dtype):
            _refuse(self.reader, self.name, work)

    def _input_scale(self, stored: "_Stored") -> np.ndarray:
        activation = self.target.recipe.activation
        if self.target.input_scale is not None:
            return self.target.input_scale
        if activation.scale_rule == "unit":
            return np.ones(activation.scale_shape((1, self.reader.stored(self.name).shape[1])), np.float32)
        if not (stored.input_scale > 0).all():
            raise CheckpointError(
                f"{self.prefix}: its static activation scale in {self.reader.path} is 0, which quantizes nothing"
            )
        return stored.input_scale

    def _write_result(self, work: "_Work", part: slice, data: jax.Array) -> None:
        self._write(work, part, np.from_dlpack(data))
        work.keep_scratch(data)

    def _write(self, work: "_Work", part: slice, data: np.ndarray) -> None:
        n, k = self.reader.stored(self.name).shape
        data = data[: n - part.start]
        work.writer.write(self.name, part.start * k * data.itemsize, data)
        work.advance(len(data) * self.bytes // max(n, 1))

    def _write_scale(self, work: "_Work", first: int, scale) -> None:
        """Some rows of the scales, from `first` on."""
        count, columns = self.target.recipe.weight.scale_shape(self.reader.stored(self.name).shape)
        scale = np.asarray(scale)[: count - first]
        name = self.prefix + self.layout.weight_scale.suffixes[0]
        work.writer.write(name, first * columns * scale.itemsize, scale)


def _refuse(reader: Reader, name: str, work: "_Work") -> None:
    """Raises for a tensor that holds NaN or Inf, with their number in all of it."""
    tensor, count = reader.stored(name), 0
    for start in range(0, tensor.nbytes, rows.CHUNK_BYTES):
        buffer = work.buffer(min(rows.CHUNK_BYTES, tensor.nbytes - start))
        reader.read_into(name, start, buffer)
        count += count_nonfinite(buffer, tensor.dtype)
    raise nonfinite_error(name, tensor.file, count, math.prod(tensor.shape))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """What the source holds beside a matrix's values; nothing where it is in 16 or 32 bits there."""

    scale: np.ndarray | None = None
    scheme: Scheme | None = None
    input_scale: np.ndarray | None = None


class _Work(Threads):
    """Threads, and where they write."""

    def __init__(self, writer: ResumableWriter, progress: Callable[[int, int], None] | None, done: int, total: int):
        super().__init__(progress, done, total)
        self.writer = writer


def _hex(array: np.ndarray | None) -> str | None:
    return None if array is None else np.asarray(array).tobytes().hex()
