"""Checkpoint to checkpoint: no model is built, and memory holds some rows of a few matrices, whatever their size; a
whole expert a thread where experts become one tensor in 16 bits, in which they lie transposed (`experts.py`).

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
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fp8x.checkpoint import rows
from fp8x.checkpoint.destination import DEFAULT_SHARD_BYTES, check_source
from fp8x.checkpoint.experts import ExpertJob
from fp8x.checkpoint.finite import is_finite, nonfinite_error
from fp8x.checkpoint.format import Layout
from fp8x.checkpoint.header import UNQUANTIZED, nbytes
from fp8x.checkpoint.packed import pack
from fp8x.checkpoint.parts import (
    StoredMatrix,
    check_codes,
    dequantized,
    not_e2m1,
    quantized_matrix,
    refuse_nonfinite,
    warn_of_flushed,
)
from fp8x.checkpoint.plan import Plan, Spec, Target
from fp8x.checkpoint.reader import CONFIG, DTYPE_NAMES, Reader
from fp8x.checkpoint.resumable import ResumableWriter
from fp8x.checkpoint.threads import Threads
from fp8x.errors import CalibrationError, CheckpointError, some
from fp8x.programs import kept_programs
from fp8x.scheme import Scheme
from fp8x.version import __version__

if TYPE_CHECKING:
    from fp8x.checkpoint.requantize import Requantization


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did. How much of its source it kept is found by reading it, also where it was resumed:
    `fp8x.checkpoint.inspect.inspect(dst, reference=src).exactness`.

    Attributes:
        plan: that it followed.
        bytes_read: of the source's matrices and other tensors, in this run.
        bytes_written: of all tensors of the destination.
        bytes_resumed: of those, the tensors that an earlier run, which was killed, had finished.
        seconds: it took, without the plan.
    """

    plan: Plan
    bytes_read: int
    bytes_written: int
    bytes_resumed: int
    seconds: float

    @property
    def format(self) -> str | None:
        """Of the destination; None where nothing there is quantized."""
        return self.plan.format and self.plan.format.name

    @property
    def requantization(self) -> "Requantization | None":
        """The recipes that `requantize` has chosen; None without it."""
        return self.plan.requantization


def run(
    plan: Plan,
    path: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes a checkpoint as planned.

    Arguments:
        path: the directory to make.
        max_shard_bytes, beside: as `fp8x.save` has them.
        progress: is called with the bytes read and the bytes in all.

    Raises:
        CheckpointError: a damaged source, NaN or Inf in a tensor, or a destination that can't be written.
        CalibrationError: static activation scales that nobody knows.
    """
    start, reader = time.monotonic(), plan.reader
    check_source(reader.path, Path(path))
    if lacking := [prefix for prefix, target in plan.targets.items() if target.needs_calibration]:
        raise CalibrationError(
            f"{some(lacking)} have static activation scales, which are found by calibration: give those that "
            "fp8x.calibrate found, or take a recipe with dynamic activation scales"
        )
    # Files are filled in this order, so that they are finished one after the other.
    jobs = [*(_Addition(name, array) for name, array in plan.added.items()), *_ordered(_jobs(plan))]
    specs = {name: spec for job in jobs for name, spec in job.specs.items()}
    beside = {**plan.beside, **(beside or {})}
    identity = [
        [__version__, version("jax"), version("jaxlib")],
        reader.identity,
        [plan.config, beside, str(plan.out_dtype), plan.allow_nonfinite],
        [(prefix, *map(repr, (t.stored, t.recipe)), _hex(t.input_scale)) for prefix, t in plan.targets.items()],
        [(name, _hex(array)) for name, array in plan.added.items()],
    ]
    total = sum(job.bytes for job in jobs)
    files = plan.origin and max_shard_bytes == DEFAULT_SHARD_BYTES and plan.origin.files(specs)
    index = plan.origin.index if files else None
    unfinished = ResumableWriter(
        path, specs, identity, max_shard_bytes=max_shard_bytes, files=files or None, index=index
    )
    if unfinished.is_complete:
        unfinished.complete()
        if progress is not None:
            progress(total, total)
        return Conversion(plan, 0, unfinished.bytes, unfinished.bytes, time.monotonic() - start)
    with unfinished as writer:
        todo = [job for job in jobs if not all(map(writer.has, job.specs))]
        work = _Work(writer, progress, total - sum(job.bytes for job in todo), total)
        resumed = sum(nbytes(*spec) for name, spec in specs.items() if writer.has(name))
        with kept_programs():
            work.run(functools.partial(job.run, work) for job in todo)
        writer.add_json(CONFIG, plan.config)
        for name, value in beside.items():
            writer.add_json(name, value)
        writer.copy_companions(reader.path)
    read = sum(job.bytes for job in todo)
    return Conversion(plan, read, writer.bytes, resumed, time.monotonic() - start)


def _jobs(plan: Plan) -> Iterator["_Copy | _Matrix | ExpertJob"]:
    """In the order in which the source's bytes lie; experts that go into one tensor in its order, so that few of its
    blocks are begun at a time (the source may have the tenth before the second).
    """
    reader = plan.reader
    matrices = {f"{prefix}.weight": prefix for prefix, target in plan.targets.items() if not target.is_copied}
    copied = {f"{prefix}.weight" for prefix, target in plan.targets.items() if target.is_copied} - plan.parts_of_whole
    names = [*matrices, *copied, *plan.copied]
    parts = {f"{prefix}.weight": each for each in plan.fused for prefix in each.prefixes}
    begun: set[str] = set()
    for name in sorted(names, key=lambda name: (str(reader.stored(name).file), reader.stored(name).start)):
        if name in parts:
            fused = parts[name]
            yield from (ExpertJob(plan, fused, i) for i in range(len(fused.experts)) if fused.name not in begun)
            begun.add(fused.name)
        elif name in matrices:
            yield _Matrix(plan, matrices[name])
        else:
            yield _Copy(plan, name)


def _ordered(jobs: Iterable["_Copy | _Matrix | ExpertJob"]) -> list["_Copy | _Matrix | ExpertJob"]:
    """So that the work begins at once: one matrix, for which JAX starts and compiles; meanwhile copies, which need no
    JAX; one matrix of each other shape, so that no program is compiled twice; and the rest.
    """
    first: dict[Any, _Matrix | ExpertJob] = {}
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

    plan: Plan
    name: str

    @property
    def reader(self) -> Reader:
        return self.plan.reader

    @property
    def specs(self) -> dict[str, Spec]:
        tensor = self.reader.stored(self.name)
        return {self.name: (tensor.dtype, tensor.shape)}

    @property
    def bytes(self) -> int:
        return self.reader.stored(self.name).nbytes

    def run(self, work: "_Work") -> None:
        dtype = self.reader.stored(self.name).dtype
        step = self.reader.stored(self.name).step(rows.CHUNK_BYTES)
        for start in range(0, self.bytes, step):
            buffer = work.buffer(min(step, self.bytes - start))
            self.reader.read_into(self.name, start, buffer)
            if not self.plan.allow_nonfinite and not is_finite(buffer, dtype):
                refuse_nonfinite(self.reader, self.name, work)
            work.writer.write(self.name, start, buffer)
            work.advance(buffer.size)


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A matrix that is quantized in the source, in the destination, or in both."""

    plan: Plan
    prefix: str

    @property
    def reader(self) -> Reader:
        return self.plan.reader

    @property
    def target(self) -> Target:
        return self.plan.targets[self.prefix]

    @functools.cached_property
    def layout(self) -> Layout | None:
        """Of the destination; None where it is in 16 or 32 bits there."""
        recipe = self.target.recipe
        return None if recipe is None else self.plan.format.written(recipe, self.reader.stored(self.name).shape)

    @property
    def name(self) -> str:
        return f"{self.prefix}.weight"

    @property
    def specs(self) -> dict[str, Spec]:
        return self.plan.specs(self.prefix)

    @property
    def bytes(self) -> int:
        return self.reader.stored(self.name).nbytes_on_disk

    @property
    def program(self) -> tuple:
        """What tells compiled programs apart."""
        (n, k), target = self.reader.stored(self.name).shape, self.target
        schemes = [recipe and recipe.weight for recipe in (target.stored, target.recipe)]
        part = next(rows.chunks(n, k, *schemes), slice(0, 0))
        return self.reader.stored(self.name).dtype, *schemes, part.stop - part.start, k

    def run(self, work: "_Work") -> None:
        """Reads rows, and writes what becomes of them."""
        source, input_scale = self._source()
        scheme = self.target.recipe and self.target.recipe.weight
        if self.layout is not None and self.layout.input_scale is not None:
            for name, array in self.layout.input_scale.write(self.prefix, self._input_scale(input_scale)).items():
                work.writer.write(name, 0, array)
        if not self.target.is_kept:
            warn_of_flushed(source, work)
        if scheme is None:
            for part, values in source.parts(work):
                dtype, allow_nonfinite = self.plan.out_dtype, self.plan.allow_nonfinite
                found = dequantized(source, values, work, dtype, allow_nonfinite=allow_nonfinite)
                self._write_result(work, part, found)
        elif self.target.is_kept:
            self._write_scale(work, 0, source.scale)
            if self.plan.format.packs:
                return self._pack(work, source)
            for part, values in source.parts(work):
                if not self.plan.allow_nonfinite:
                    check_codes(source, values, work)
                self._write(work, part, values.data)
        elif scheme.block[0] is None:
            self._convert_whole(work, source, scheme)
        else:
            for part, values in source.parts(work, scheme):
                data, scale, top = rows.quantized(values, work.scratch(values.shape), scheme=scheme)
                if not np.isfinite(top).all():
                    self._check_nonfinite(work, source)
                    data, scale = rows.quantized_finite(values, data, scheme=scheme)
                self._write_result(work, part, data)
                self._write_scale(work, part.start // scheme.block[0], scale)

    def _pack(self, work: "_Work", source: StoredMatrix) -> None:
        missing = 0
        for part, values in source.parts(work):
            codes, count = pack(values.data)
            missing += count
            self._write(work, part, codes)
        if missing:
            raise not_e2m1(source, missing)

    def _convert_whole(self, work: "_Work", source: StoredMatrix, scheme: Scheme) -> None:
        """To blocks that hold every row: their scales before their values."""
        scale = source.scale_of_amax(work, self._amax(work, source, scheme), scheme)
        self._write_scale(work, 0, scale)
        for part, values in source.parts(work, scheme):
            data = rows.quantized_with_scale(values, scale, work.scratch(values.shape), scheme=scheme)
            self._write_result(work, part, data)

    def _source(self) -> tuple[StoredMatrix, np.ndarray | None]:
        """The matrix as it is stored, and its static activation scale there."""
        stored, plan = self.target.stored, self.plan
        if stored is not None:
            return quantized_matrix(
                plan.source_format, self.prefix, stored, self.reader, allow_nonfinite=plan.allow_nonfinite
            )
        self.reader.check(self.name, shapes=[self.reader.stored(self.name).shape], dtypes=UNQUANTIZED)
        return StoredMatrix(self.reader, self.name), None

    def _amax(self, work: "_Work", source: StoredMatrix, scheme: Scheme) -> np.ndarray:
        """Of blocks that hold every row."""
        found = np.zeros(scheme.scale_shape(self.reader.stored(self.name).shape), np.float32)
        for _, values in source.parts(work, scheme):
            amax = np.asarray(rows.block_max(values, scheme))
            if not np.isfinite(amax).all():
                self._check_nonfinite(work, source)
                amax = rows.block_amax(values, scheme)
            found = np.maximum(found, amax)
        return found

    def _check_nonfinite(self, work: "_Work", source: StoredMatrix) -> None:
        if self.plan.allow_nonfinite:
            return
        tensor = self.reader.stored(self.name)
        count = sum(int(rows.count_nonfinite(values)) for _, values in source.parts(work))
        raise nonfinite_error(self.name, tensor.file, count, math.prod(tensor.shape))

    def _input_scale(self, stored: np.ndarray | None) -> np.ndarray:
        activation = self.target.recipe.activation
        if self.target.input_scale is not None:
            return self.target.input_scale
        if activation.scale_rule == "unit":
            return np.ones(activation.scale_shape((1, self.reader.stored(self.name).shape[1])), np.float32)
        if not (stored > 0).all():
            raise CheckpointError(
                f"{self.prefix}: its static activation scale in {self.reader.path} is 0, which quantizes nothing"
            )
        return stored

    def _write_result(self, work: "_Work", part: slice, data: jax.Array) -> None:
        self._write(work, part, np.from_dlpack(data))
        work.keep_scratch(data)

    def _write(self, work: "_Work", part: slice, data: np.ndarray) -> None:
        n, _ = self.reader.stored(self.name).shape
        data = data[: n - part.start]
        name = self.name if self.layout is None else self.prefix + self.layout.weight.suffixes[0]
        work.writer.write(name, part.start * data.shape[1] * data.itemsize, data)
        work.advance(len(data) * self.bytes // max(n, 1))

    def _write_scale(self, work: "_Work", first: int, scale) -> None:
        """Some rows of the scales, from `first` on."""
        count, columns = self.target.recipe.weight.scale_shape(self.reader.stored(self.name).shape)
        scale = np.asarray(scale)[: count - first]
        name = self.prefix + self.layout.weight_scale.suffixes[0]
        work.writer.write(name, first * columns * scale.itemsize, scale)


class _Work(Threads):
    """Threads, and where they write."""

    def __init__(self, writer: ResumableWriter, progress: Callable[[int, int], None] | None, done: int, total: int):
        super().__init__(progress, done, total)
        self.writer = writer


def _hex(array: np.ndarray | None) -> str | None:
    return None if array is None else np.asarray(array).tobytes().hex()
