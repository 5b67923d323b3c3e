"""`ExpertJob`: what a conversion does for one expert whose matrices go into a tensor of all experts (`fusing.py`)."""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from fp8x.checkpoint.finite import is_finite
from fp8x.checkpoint.fusing import FusedExperts
from fp8x.checkpoint.header import nbytes
from fp8x.checkpoint.packed import pack
from fp8x.checkpoint.parts import (
    StoredMatrix,
    dequantized,
    not_e2m1,
    quantized_matrix,
    refuse_nonfinite,
    warn_of_flushed,
)
from fp8x.checkpoint.plan import Plan, Spec
from fp8x.checkpoint.reader import DTYPE_NAMES, Reader

if TYPE_CHECKING:
    from fp8x.checkpoint.convert import _Work


@dataclasses.dataclass(frozen=True)
class ExpertJob:
    """Gate and up of an expert, or down.

    Attributes:
        index: of the expert.
    """

    plan: Plan
    fused: FusedExperts
    index: int

    @property
    def reader(self) -> Reader:
        return self.plan.reader

    @property
    def prefixes(self) -> tuple[str, ...]:
        return self.fused.experts[self.index]

    @property
    def names(self) -> list[str]:
        return [f"{prefix}.weight" for prefix in self.prefixes]

    @property
    def specs(self) -> dict[str, Spec]:
        """The tensors of all experts."""
        return self.plan.fused_specs[self.fused.name]

    @property
    def bytes(self) -> int:
        """Of the source's matrices."""
        return sum(self.reader.stored(name).nbytes_on_disk for name in self.names)

    @property
    def program(self) -> tuple:
        """What tells compiled programs apart."""
        stored = self.reader.stored(self.names[0])
        return "experts", stored.shape, self.plan.targets[self.prefixes[0]].stored

    def run(self, work: "_Work") -> None:
        sources = [self._source(prefix) for prefix in self.prefixes]
        if members := self.plan.fused_biases.get(self.fused.bias):
            first = self.index * len(self.prefixes)
            self._write_biases(work, members[first : first + len(self.prefixes)])
        if self.plan.targets[self.prefixes[0]].recipe is None:
            self._write_values(work, sources)
        else:
            self._write_codes(work, sources)

    def _source(self, prefix: str) -> StoredMatrix:
        plan, stored = self.plan, self.plan.targets[prefix].stored
        matrix, _ = quantized_matrix(
            plan.source_format, prefix, stored, self.reader, allow_nonfinite=plan.allow_nonfinite
        )
        return matrix

    def _write(self, work: "_Work", name: str, offset: int, values: np.ndarray) -> None:
        """Writes a part of what this expert has in a tensor."""
        dtype, shape = self.specs[name]
        work.writer.write(name, self.index * nbytes(dtype, shape[1:]) + offset, values)

    def _write_biases(self, work: "_Work", members: tuple[str, ...]) -> None:
        stored = [self.reader.stored(member) for member in members]
        read = [self.reader.read(m, shapes=[s.shape], dtypes=[s.dtype]) for m, s in zip(members, stored)]
        for member, array in zip(members, read):
            if not self.plan.allow_nonfinite and not is_finite(array, DTYPE_NAMES[array.dtype]):
                refuse_nonfinite(self.reader, member, work)
        self._write(work, self.fused.bias, 0, np.stack(read, axis=-1))

    def _write_codes(self, work: "_Work", sources: list[StoredMatrix]) -> None:
        """In 4 bits: rows as they lie, gate's and up's in turn."""
        scales = np.stack([source.scale.view(np.uint8) for source in sources], axis=1)
        self._write(work, f"{self.fused.name}_scales", 0, scales)
        missing, (n, k) = [0] * len(sources), sources[0].shape
        parts = zip(*(source.parts(work, use=f"values {i}") for i, source in enumerate(sources)))
        for found in parts:
            start, stop = found[0][0].start, min(found[0][0].stop, n)
            codes = []
            for i, (_, values) in enumerate(found):
                packed, count = pack(values.data[: stop - start])
                codes.append(packed)
                missing[i] += count
            self._write(work, f"{self.fused.name}_blocks", start * len(sources) * k // 2, np.stack(codes, axis=1))
            work.advance((stop - start) * self.bytes // n)
        for source, count in zip(sources, missing):
            if count:
                raise not_e2m1(source, count)

    def _write_values(self, work: "_Work", sources: list[StoredMatrix]) -> None:
        """In 16 or 32 bits: transposed, a column for each row. So rows end up all over the expert, which is written
        when it is whole."""
        dtype, (_, k, lines) = self.plan.out_dtype, self.specs[self.fused.name][1]
        bits = np.dtype(f"uint{8 * dtype.itemsize}")
        whole = work.buffer(math.prod((k, lines, dtype.itemsize)), "expert").view(bits).reshape(k, lines)
        for index, source in enumerate(sources):
            warn_of_flushed(source, work)
            for part, values in source.parts(work):
                found = dequantized(source, values, work, dtype, allow_nonfinite=self.plan.allow_nonfinite)
                stop = min(part.stop, source.shape[0])
                array = np.from_dlpack(found)[: stop - part.start]
                whole[:, index :: len(sources)][:, part.start : stop] = array.T
                work.keep_scratch(found)
                work.advance(len(array) * self.bytes // (len(sources) * source.shape[0]))
        self._write(work, self.fused.name, 0, whole)
