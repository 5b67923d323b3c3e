"""`Plan`: what a conversion will do with every tensor, field and file of a checkpoint. Made of no JAX.

`fp8x.plan` makes one, `fp8x.convert` runs it.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8x.checkpoint.companions import Companions
from fp8x.checkpoint.format import Format
from fp8x.checkpoint.fusing import FusedExperts, biases
from fp8x.checkpoint.header import DTYPE_NAMES, nbytes
from fp8x.checkpoint.kept import LOOKUPS
from fp8x.checkpoint.names import natural
from fp8x.checkpoint.origin import Origin
from fp8x.checkpoint.packed import BLOCK, MXFP4
from fp8x.checkpoint.reader import Reader
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme

if TYPE_CHECKING:
    from fp8x.checkpoint.requantize import Requantization

Spec = tuple[str, tuple[int, ...]]  # dtype by safetensors' name, shape


@dataclasses.dataclass(frozen=True)
class Target:
    """What becomes of one matrix `[N, K]`.

    Attributes:
        stored: its recipe in the source; None where it is in 16 or 32 bits there.
        recipe: its recipe in the destination; None for 16 or 32 bits.
        input_scale: the static activation scale, float32 `[1, groups]`, if it was calibrated.
        reason: why it is in 16 or 32 bits in the destination; None where it is not, or was asked to be.
    """

    stored: Recipe | None
    recipe: Recipe | None
    input_scale: np.ndarray | None = None
    reason: str | None = None

    @property
    def is_copied(self) -> bool:
        """Whether it is in 16 or 32 bits before and after."""
        return self.stored is None and self.recipe is None

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
        return stored is None or not stored.is_static or not stored.activation.stores_alike(self.recipe.activation)


@dataclasses.dataclass(frozen=True)
class Row:
    """What becomes of a tensor, or of several alike.

    Attributes:
        name: in the source; of several, with `*` for their numbers.
        count: how many they are.
        shape: of each.
        before, after: a `Scheme`, "mxfp4", or the stored type ("bf16"). None where the tensor is not in the source, or
            not in the destination.
        bytes_before, bytes_after: of all of them, with their scales.
        reason: why it stays in 16 or 32 bits, or is left out; None for what is in 8 bits, and for what was asked for.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    before: Scheme | str | None
    after: Scheme | str | None
    bytes_before: int
    bytes_after: int
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        schemes = {key: value and str(value) for key, value in (("before", self.before), ("after", self.after))}
        return dataclasses.asdict(self) | {"shape": list(self.shape)} | schemes


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a conversion will do; prints as a table.

    Attributes:
        reader: the source.
        modules: the prefixes (tensor names without `.weight`) of every module that holds matrices, by path: as
            `fp8x.load` has it where it knows the model, else the prefix itself.
        targets: of every prefix.
        source_format, format: None where nothing is quantized.
        out_dtype: in which the model computes; of matrices that are dequantized.
        config: the destination's config.json. beside: further JSON files, by name.
        dropped: tensors that are left out, with the reason. added: tensors that the source does not hold so.
        whole: tensors of several experts that are copied as they are.
        fused: matrices of experts that go into one tensor.
        left_fields: fields of the source's configuration that are left out, by dotted path, with the reason.
        companions: the files beside the weights.
        requantization: the recipes that `requantize` has chosen; None without it.
        origin: what the destination, in 4 bits, is to be like again; None for all others.
        allow_nonfinite: whether tensors may hold NaN or Inf.
    """

    reader: Reader
    modules: Mapping[str, list[str]]
    targets: Mapping[str, Target]
    source_format: Format | None
    format: Format | None
    out_dtype: np.dtype
    config: Mapping[str, Any]
    beside: Mapping[str, Mapping[str, Any]]
    dropped: Mapping[str, str]
    added: Mapping[str, np.ndarray]
    whole: tuple[str, ...]
    fused: tuple[FusedExperts, ...]
    left_fields: Mapping[str, str]
    companions: Companions
    requantization: "Requantization | None" = None
    origin: Origin | None = None
    allow_nonfinite: bool = False

    @property
    def path(self) -> Path:
        """The source's directory."""
        return self.reader.path

    @functools.cached_property
    def scales(self) -> frozenset[str]:
        """The tensors of the source that are part of a matrix in 8 bits, beside its values."""
        return frozenset(
            name
            for prefix, target in self.targets.items()
            if target.stored is not None
            for name in self.source_format.names(prefix, target.stored, self._shape(prefix), self.reader)[1:]
        )

    @functools.cached_property
    def fused_biases(self) -> dict[str, tuple[str, ...]]:
        """The biases that go into one tensor, by its name."""
        found = {fused.bias: biases(self.reader, fused) for fused in self.fused}
        return {name: members for name, members in found.items() if members}

    @functools.cached_property
    def fused_parts(self) -> frozenset[str]:
        """The prefixes of matrices, and the biases, that go into another tensor."""
        matrices = {prefix for fused in self.fused for prefix in fused.prefixes}
        return frozenset(matrices.union(*self.fused_biases.values()))

    @functools.cached_property
    def fused_specs(self) -> dict[str, dict[str, Spec]]:
        """The tensors of all that goes into one tensor in the destination, by `FusedExperts.name`."""
        return {fused.name: self._fused_specs(fused) for fused in self.fused}

    def specs(self, prefix: str) -> dict[str, Spec]:
        """The tensors of a matrix in the destination; where it goes into another, what it is there."""
        recipe, shape, name = self.targets[prefix].recipe, self._shape(prefix), f"{prefix}.weight"
        if self.targets[prefix].is_copied:
            return {name: (self.reader.stored(name).dtype, shape)}
        if recipe is None:
            return {name: (DTYPE_NAMES[self.out_dtype], shape)}
        layout = self.format.written(recipe, shape)
        parts = (layout.weight, layout.weight_scale, layout.input_scale)
        return {prefix + part.suffixes[0]: (part.dtypes[0], part.shapes[0]) for part in parts if part is not None}

    @functools.cached_property
    def copied(self) -> tuple[str, ...]:
        """The tensors that are copied as they are, and are none of `targets`, as the source's files have them."""
        claimed = (
            {f"{prefix}.weight" for prefix in self.targets}
            | self.scales
            | self.parts_of_whole
            | self.fused_parts
            | set(self.dropped)
        )
        return (*self.whole, *(name for name in self.reader if name not in claimed))

    @functools.cached_property
    def rows(self) -> list[Row]:
        """A row for every tensor, in the order of the model; the scales of a matrix count with it."""
        rows = [self._matrix(prefix) for prefix in self.targets if f"{prefix}.weight" not in self.parts_of_whole]
        rows += [self._copy(name) for name in (*self.copied, *itertools.chain(*self.fused_biases.values()))]
        rows += [self._dropped(name) for name in self.dropped if name not in self.added]
        rows += [self._added(name) for name in self.added]
        return sorted(rows, key=lambda row: natural(row.name))

    @functools.cached_property
    def groups(self) -> list[Row]:
        """The rows with those that differ in numbers alone (of layers, of experts) in one."""
        found: dict[tuple, list[Row]] = {}
        for row in self.rows:
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name)
            found.setdefault((pattern, row.shape, row.before, row.after, row.reason), []).append(row)
        return [rows[0] if len(rows) == 1 else _merged(pattern, rows) for (pattern, *_), rows in found.items()]

    @property
    def bytes_before(self) -> int:
        """Of all tensors of the source."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Of all tensors of the destination."""
        return sum(row.bytes_after for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """What the plan says, for machines."""
        return {
            "source_format": self.source_format and self.source_format.name,
            "format": self.format and self.format.name,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "groups": [row.to_json() for row in self.groups],
            "fields_left_out": dict(self.left_fields),
            "files": [str(file) for file in self.companions.files],
            "files_left_behind": dict(self.companions.left),
        }

    def __str__(self) -> str:
        lines = [
            f"{row.count} × {row.name} {'×'.join(map(str, row.shape))}: {row.before} → {row.after or 'left out'}, "
            f"{row.bytes_before:,} → {row.bytes_after:,} bytes{f' ({row.reason})' if row.reason else ''}"
            for row in self.groups
        ]
        left = [f"left out: {name} ({reason})" for name, reason in {**self.left_fields, **self.companions.left}.items()]
        return "\n".join([*lines, *left, f"in all {self.bytes_before:,} → {self.bytes_after:,} bytes"])

    def check_shapes(self) -> None:
        """
        Raises:
            CheckpointError: a matrix of other than two dims.
            ShapeError: a matrix that its recipe does not fit.
        """
        for prefix, target in self.targets.items():
            shape = matrix_shape(self.reader, f"{prefix}.weight")
            if target.recipe is not None:
                target.recipe.weight.check_shape(shape, f"{prefix}.weight")

    def check_names(self) -> None:
        """
        Raises:
            CheckpointError: the destination would hold two tensors of one name.
        """
        sources = {
            name: f"part of {prefix}.weight, as {self.format.name if self.format else 'it is'} stores it"
            for prefix in self.targets
            if f"{prefix}.weight" not in self.parts_of_whole and prefix not in self.fused_parts
            for name in self.specs(prefix)
        } | {name: f"the experts' matrices in {fused}" for fused, specs in self.fused_specs.items() for name in specs}
        for name, source in (
            *((name, "a scale of the KV cache") for name in self.added),
            *((name, f"the tensor of that name in {self.reader.stored(name).file}") for name in self.copied),
        ):
            if name in sources:
                raise CheckpointError(f"{name}: would be written twice, as {sources[name]}, and as {source}")
            sources[name] = source

    @functools.cached_property
    def parts_of_whole(self) -> frozenset[str]:
        return frozenset(part for name in self.whole for part in self.reader.fused[name])

    def _fused_specs(self, fused: FusedExperts) -> dict[str, Spec]:
        (n, k), count, parts = self._shape(fused.prefixes[0]), len(fused.experts), len(fused.experts[0])
        lines = parts * n
        if self.targets[fused.prefixes[0]].recipe is None:
            specs = {fused.name: (DTYPE_NAMES[self.out_dtype], (count, k, lines))}
        else:
            specs = {
                f"{fused.name}_blocks": ("U8", (count, lines, k // BLOCK, BLOCK // 2)),
                f"{fused.name}_scales": ("U8", (count, lines, k // BLOCK)),
            }
        if members := self.fused_biases.get(fused.bias):
            specs[fused.bias] = (self.reader.stored(members[0]).dtype, (count, lines))
        return specs

    def _shape(self, prefix: str) -> tuple[int, int]:
        return self.reader.stored(f"{prefix}.weight").shape

    def _matrix(self, prefix: str) -> Row:
        name, target, shape = f"{prefix}.weight", self.targets[prefix], self._shape(prefix)
        names = [name]
        if target.stored is not None:
            names = self.source_format.names(prefix, target.stored, shape, self.reader)
            names = [each for each in names if each not in self.dropped]
        specs = self.specs(prefix)
        return Row(
            name,
            1,
            shape,
            self.reader.stored(name).dtype.lower() if target.stored is None else self._scheme(prefix),
            specs[name][0].lower() if target.recipe is None else MXFP4 if self.format.packs else target.recipe.weight,
            sum(self.reader.stored(each).nbytes_on_disk for each in names),
            sum(nbytes(*spec) for spec in specs.values()),
            target.reason,
        )

    def _scheme(self, prefix: str) -> Scheme | str:
        """Of a matrix in 8 bits, or in 4, in the source."""
        return MXFP4 if self.reader.stored(f"{prefix}.weight").is_packed else self.targets[prefix].stored.weight

    def _copy(self, name: str) -> Row:
        tensor = self.reader.stored(name)
        dtype, reason = tensor.dtype.lower(), self._why_copied(name)
        return Row(name, 1, tensor.shape, dtype, dtype, tensor.nbytes, tensor.nbytes, reason)

    def _why_copied(self, name: str) -> str:
        if name in self.whole:
            reasons = (self.targets[part.rpartition(".")[0]].reason for part in self.reader.fused[name])
            return next(reasons) or ""
        return why_no_matrix(self.reader, name)

    def _dropped(self, name: str) -> Row:
        tensor = self.reader.stored(name)
        return Row(name, 1, tensor.shape, tensor.dtype.lower(), None, tensor.nbytes, 0, self.dropped[name])

    def _added(self, name: str) -> Row:
        array, dtype, size = self.added[name], None, 0
        if name in self.reader:
            dtype, size = self.reader.stored(name).dtype.lower(), self.reader.stored(name).nbytes
        return Row(name, 1, array.shape, dtype, DTYPE_NAMES[array.dtype].lower(), size, array.nbytes)


def why_no_matrix(reader: Reader, name: str) -> str:
    """Why a tensor is none of a linear layer's matrices."""
    tensor = reader.stored(name)
    if name in reader.whole:
        return reader.whole[name]
    if len(tensor.shape) < 2:
        return "a vector or a number"
    if not tensor.dtype.startswith(("F", "BF")):
        return "no floats"
    if LOOKUPS.fullmatch(name.removesuffix(".weight")):
        return "a lookup table or a norm"
    if len(tensor.shape) > 2:
        return f"{len(tensor.shape)} dims; fp8x knows no layer by that name"
    if not name.endswith(".weight"):
        return "no linear layer's weight by its name"
    return "not among the linear layers of this model"


def matrix_shape(reader: Reader, name: str) -> tuple[int, int]:
    """The shape of a stored matrix.

    Raises:
        CheckpointError: it has another number of dims.
    """
    tensor = reader.stored(name)
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{name} in {tensor.file}: shape is {list(tensor.shape)}, expected a matrix [N, K]")
    return tensor.shape


def _merged(name: str, rows: Iterable[Row]) -> Row:
    rows = list(rows)
    return dataclasses.replace(
        rows[0],
        name=name,
        count=len(rows),
        bytes_before=sum(row.bytes_before for row in rows),
        bytes_after=sum(row.bytes_after for row in rows),
    )
