"""The header of a safetensors file: what lies where. https://huggingface.co/docs/safetensors, "Format"."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from fp8x.checkpoint.downloads import HEAD, check_download
from fp8x.errors import CheckpointError

MAX_HEADER = 100 * 10**6  # bytes; the limit of the safetensors library
MAX_DIMS = 64  # of a numpy array
MAX_BYTES = 2**63  # of an array

# By safetensors' names.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F64": np.dtype(np.float64),
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What a matrix's values may be stored in.
UNQUANTIZED = ("BF16", "F32", "F16")
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ")

# Bits of an element: of these types, and of those that numpy lacks and nobody here computes with.
BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
}


@dataclasses.dataclass(frozen=True)
class View:
    """How a matrix `[N, K]`, or a vector `[N]`, lies in bytes that hold other lines too, or other codes.

    Attributes:
        lines: how many rows there are in the bytes, or columns where `is_transposed`.
        first, step: of these the matrix has `first`, `first + step`, …
        is_transposed: whether the bytes hold `[K, lines]`.
        is_packed: whether a byte holds two numbers of e2m1, the first in its low half, which appear as e4m3.
    """

    lines: int
    first: int = 0
    step: int = 1
    is_transposed: bool = False
    is_packed: bool = False


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        file, dtype, shape: its file, its type by safetensors' name, and its shape.
        start, stop: its bytes in the file, or, with a view, those in which it lies.
        view: how it lies in them; None where they are the tensor's own.
        description: what the file says of it besides (`flattened.py`).
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    view: View | None = None
    description: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return nbytes(self.dtype, self.shape)

    @property
    def nbytes_on_disk(self) -> int:
        """Of the tensor, as the file holds it."""
        return self.nbytes // 2 if self.is_packed else self.nbytes

    @property
    def is_packed(self) -> bool:
        """Whether the file holds it in 4 bits: e2m1, which appears as e4m3."""
        return self.view is not None and self.view.is_packed

    @property
    def row_bytes(self) -> int:
        """Of the tensor."""
        return nbytes(self.dtype, self.shape[1:])

    def step(self, size: int) -> int:
        """How many bytes to read at a time, about `size`: whole rows of what has a view."""
        row = 1 if self.view is None else max(self.row_bytes, 1)
        return max(size // row, 1) * row


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; `dtype` by safetensors' name."""
    return BITS[dtype] * math.prod(shape) // 8


def make_header(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """What a file of these tensors (name -> type, shape) begins with, and where in it each begins, in their order."""
    # The types with the widest elements first, so that every tensor is aligned; else as they come.
    ordered = sorted(specs, key=lambda name: -BITS[specs[name][0]])
    # transformers refuses files that do not name a framework.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        dtype, shape = specs[name]
        begin, end = end, end + nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + entries[name]["data_offsets"][0] for name in ordered}


def read_header(f: BinaryIO, file: Path) -> tuple[dict[str, Stored], Any]:
    """The tensors of an open safetensors file, and its `__metadata__`, unchecked.

    Checks all that the library checks, and what it lets pass (0.8): a name that comes twice, or as no Unicode. So a
    damaged file is refused before any of its tensors is used.

    Raises:
        CheckpointError: the file is truncated, something else in its place, or its header is none; the message names
            file and tensor.
    """
    size = f.seek(0, 2)
    f.seek(0)
    check_download(f.read(HEAD), file)
    f.seek(0)
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > size - 8:
        needs = "8 bytes" if size < 8 else f"a header of {length:,} bytes"
        raise CheckpointError(
            f"{file}: is truncated or not a safetensors file: has {size:,} bytes, begins with {needs}"
        )
    if length > MAX_HEADER:
        raise CheckpointError(f"{file}: is not a safetensors file: a header of {length:,} bytes is over {MAX_HEADER:,}")
    entries = parse_object(f.read(length), f"{file}: the header")
    metadata = entries.pop("__metadata__", None)
    tensors = {name: _read_entry(name, entry, file, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            what = "overlaps the one before it" if tensor.start < end else f"begins {tensor.start - end:,} bytes late"
            raise CheckpointError(f"{name} in {file}: {what}; the file is damaged")
        end = tensor.stop
    if end != size:
        what = "is truncated" if size < end else "has bytes that no tensor holds"
        raise CheckpointError(f"{file}: {what}: it has {size:,} bytes, its header describes {end:,}")
    return tensors, metadata


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object that nowhere has a key twice: readers disagree on which of them counts.

    Raises:
        CheckpointError: `text` is something else; `where` it lies is in the message.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"{key!a} comes twice in one object")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is a JSON {type(value).__name__}, expected an object")
    return value


def _read_entry(name: str, entry: Any, file: Path, base: int) -> Stored:
    where = f"{name!a} in {file}"
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{where}: the name is no Unicode") from None
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header has {entry!r:.200}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: dtype {dtype!r:.200} is unknown; safetensors has {', '.join(BITS)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{where}: shape {shape!r:.200} is no list of at most {MAX_DIMS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {offsets!r:.200} are no list of a begin and an end")
    # An empty array's other dims count as well: numpy multiplies them.
    if BITS[dtype] * math.prod(max(n, 1) for n in shape) >= 8 * MAX_BYTES:
        raise CheckpointError(f"{where}: shape {shape} is larger than an array can be")
    start, stop = offsets
    if 8 * (stop - start) != BITS[dtype] * math.prod(shape):
        raise CheckpointError(f"{where}: {dtype} of shape {shape} does not fit into bytes {start:,} to {stop:,}")
    return Stored(file, dtype, tuple(shape), base + start, base + stop)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
