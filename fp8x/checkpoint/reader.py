"""`Reader`: the tensors of a Hugging Face directory, checked before anyone computes with them."""

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from fp8x.checkpoint import views
from fp8x.checkpoint.downloads import HEAD, check_download, unfinished
from fp8x.checkpoint.flattened import is_flattened, undescribed, unflattened
from fp8x.checkpoint.fused import unfused
from fp8x.checkpoint.header import DTYPE_NAMES as DTYPE_NAMES
from fp8x.checkpoint.header import DTYPES as DTYPES
from fp8x.checkpoint.header import Stored as Stored
from fp8x.checkpoint.header import parse_object, read_header
from fp8x.checkpoint.noted import Noted
from fp8x.checkpoint.packed import unpacked
from fp8x.checkpoint.source import source_directory
from fp8x.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LEGACY = "hf_quant_config.json"
QUANTIZATION, OLDER = "quantization_config", "compression_config"  # in config.json
DESCRIPTION = "fp8x.json"  # in the place of config.json, where the model is no Hugging Face one


class Reader:
    """A Hugging Face directory: `config.json`, and `model.safetensors` or several files with an index.

    Only headers are read when one is built; a tensor's bytes are read when they are used. Experts that are fused on
    disk appear one by one (`fused.py`), and what they are of is known by its own name, too, but not listed. torchao's
    tensors appear under the names of all others (`flattened.py`), and what is in MXFP4 as MXFP8 (`packed.py`).

    Arguments:
        config: the JSON file beside the tensors; where it is `fp8x.json`, tensors appear as they are named on disk.

    Attributes:
        path: the directory, absolute.
        config: that file, parsed, with older places of `quantization_config` in that field, which notes what is read.
        fused: by the name of each tensor of several experts, the names of their matrices.
        whole: the tensors of experts that are not taken apart, with the reason.
        metadata: what the files' headers say besides the framework's name, where it is of no use to fp8x.
        unread: what else the directory says and nobody reads, by file or dotted field, with the reason.

    Raises:
        CheckpointError: anything is missing, truncated or contradicts itself; the message names file and tensor.
    """

    def __init__(self, path: str | Path, *, config: str = CONFIG):
        self._tensors: dict[str, Stored] = {}
        self._files: dict[Path, views.OpenFile] = {}
        self._lock = threading.Lock()
        self._identities: dict[Path, tuple[int, ...]] = {}
        with _explained(Path(path)):
            self.path = source_directory(path, config)
            self.unread: dict[str, str] = {}
            self.config: dict[str, Any] = (
                _read_config(self.path, self.unread) if config == CONFIG else read_json(self.path / config)
            )
            listed = _listed_files(self.path, self.unread)
        files = dict.fromkeys(listed.values()) if listed else [self.path / SINGLE]
        metadata = {file: self._open(file) for file in files}
        for name, file in listed.items():
            if name not in self._tensors or self._tensors[name].file != file:
                raise CheckpointError(f"{self.path / INDEX}: says that {file.name} holds {name}, but it does not")
        said = [found for found in metadata.values() if isinstance(found, Mapping)]
        self.metadata = {
            key: value for found in said for key, value in found.items() if (key, value) != ("format", "pt")
        }
        self.fused: Mapping[str, list[str]] = {}
        self.whole: Mapping[str, str] = {}
        self._fused_tensors: dict[str, Stored] = {}
        if config == CONFIG:
            if is_flattened(self.config):
                self._tensors = unflattened(self._tensors, metadata)
                self.metadata = undescribed(self.metadata)
            self._tensors = unpacked(self._tensors)
            found = unfused(self._tensors, model_type(self.config))
            self.fused, self.whole = found.parts, found.whole
            self._fused_tensors = {name: self._tensors[name] for name in self.fused}
            self._tensors = found.tensors

    def _open(self, file: Path) -> Any:
        """Adds a file's tensors; returns its `__metadata__`."""
        with _explained(file), file.open("rb") as f:
            tensors, metadata = read_header(f, file)
            self._identities[file] = _identity(os.fstat(f.fileno()))
        for name, tensor in tensors.items():
            if name in self._tensors:
                first = self._tensors[name].file.name
                raise CheckpointError(f"{name}: is in both {first} and {file.name} of {self.path}")
            self._tensors[name] = tensor
        return metadata

    @property
    def files(self) -> frozenset[Path]:
        """The safetensors files of the checkpoint."""
        return frozenset(self._identities)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def stored(self, name: str) -> Stored:
        """Where a tensor lies.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        found = self._tensors.get(name) or self._fused_tensors.get(name)
        if found is None:
            raise CheckpointError(f"{name}: missing from {self.path} ({len(self._tensors)} tensors)")
        return found

    def check(self, name: str, *, shapes: Iterable[tuple[int, ...]], dtypes: Iterable[str]) -> Stored:
        """Where a tensor lies, if it is as expected; arguments and errors are those of `read`."""
        tensor, shapes, dtypes = self.stored(name), list(shapes), list(dtypes)
        where = f"{name} in {tensor.file}"
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"{where}: dtype is {tensor.dtype}, expected {' or '.join(dtypes)}")
        if tensor.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(f"{where}: shape is {list(tensor.shape)}, expected {expected}")
        return tensor

    def read(self, name: str, *, shapes: Iterable[tuple[int, ...]], dtypes: Iterable[str]) -> np.ndarray:
        """A tensor, in memory of its own. (A mapped file that is truncated meanwhile would end the process: SIGBUS.)

        Arguments:
            shapes: what fits.
            dtypes: what fits, by safetensors' names ("BF16", "F8_E4M3").

        Raises:
            CheckpointError: no such tensor, or one of another shape or type; a file that has changed since its header
                was read.
        """
        return self.slices(name, shapes=shapes, dtypes=dtypes)[...]

    def slices(self, name: str, *, shapes: Iterable[tuple[int, ...]], dtypes: Iterable[str]) -> "Slices":
        """A tensor of which only what is asked for is read, `slices[:128, 64:]`; arguments and errors are `read`'s."""
        return Slices(self, name, self.check(name, shapes=shapes, dtypes=dtypes))

    @property
    def identity(self) -> list[tuple[str, ...]]:
        """What tells the files apart from those of another checkpoint, or of this one after a change."""
        files = {tensor.file for tensor in self._tensors.values()}
        return sorted((os.path.realpath(file), *map(str, self._identities[file])) for file in files)

    def read_into(self, name: str, start: int, buffer: np.ndarray) -> None:
        """Fills a writable array, contiguous and of any type, with a tensor's bytes from `start` on.

        From several threads at once if need be. The file stays open until `close`, or until nobody has the reader. Of a
        tensor with a view, these have to be whole rows.

        Raises:
            CheckpointError: no such tensor, or a file that has changed since its header was read.
        """
        tensor = self.stored(name)
        with self._opened(tensor.file) as file:
            if tensor.view is None or not buffer.size:
                views.read_bytes(file, tensor, name, tensor.start + start, buffer)
            elif tensor.view.is_transposed:
                views.read_columns(file, tensor, name, start, buffer)
            else:
                views.read_rows(file, [tensor], name, start, [buffer])

    def read_together(self, names: Sequence[str], buffers: Sequence[np.ndarray]) -> None:
        """`read_into` of whole tensors; those whose rows lie in turn, as gpt-oss's gate and up do, are read at once."""
        tensors = [self.stored(name) for name in names]
        if len(names) > 1 and views.lie_in_turn(tensors) and buffers[0].size:
            with self._opened(tensors[0].file) as file:
                views.read_rows(file, tensors, names[0], 0, buffers)
            return
        for name, buffer in zip(names, buffers, strict=True):
            self.read_into(name, 0, buffer)

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator["views.OpenFile"]:
        """A file, in which what is read inside the block is what lay there when its header was read."""
        with _explained(path):
            with self._lock:
                if path not in self._files:
                    self._files[path] = views.OpenFile(path)
                file = self._files[path]
            yield file
            # Afterwards: what was written before or meanwhile shows, a file in its place is none of ours.
            self._check_unchanged(path, os.fstat(file.descriptor))

    def close(self) -> None:
        """Closes the files; what is read after that opens them again."""
        with self._lock:
            self._files.clear()

    def check_there(self, name: str) -> None:
        """Raises CheckpointError unless the file of a tensor is still the one whose header was read."""
        file = self.stored(name).file
        with _explained(file):
            self._check_unchanged(file, file.stat())

    def _check_unchanged(self, file: Path, status: os.stat_result) -> None:
        if _identity(status) != self._identities[file]:
            raise CheckpointError(f"{file}: has changed since the checkpoint was opened; open it again")


class Slices:
    """A stored tensor of which only what is asked for is read, each time anew.

    Attributes:
        name: in the checkpoint.
        shape: of the whole.
        dtype: numpy's.
    """

    def __init__(self, reader: Reader, name: str, tensor: Stored):
        self._reader, self.name = reader, name
        self.shape, self.dtype = tensor.shape, DTYPES[tensor.dtype]

    def __getitem__(self, index: EllipsisType | tuple[slice, ...]) -> np.ndarray:
        """A range of each dim, or `...` for everything: an array in memory of its own.

        Rows are read whole and cut, some at a time: on a disk that costs no more than to read parts of them.
        """
        self._reader.check_there(self.name)
        if index is ... or not self.shape:
            return self._filled(aligned(self.shape, self.dtype), 0)
        rows, *rest = (range(n)[part] for n, part in itertools.zip_longest(self.shape, index, fillvalue=slice(None)))
        width, shape = math.prod(self.shape[1:]) * self.dtype.itemsize, (len(rows), *map(len, rest))
        if shape[1:] == self.shape[1:]:
            return self._filled(aligned(shape, self.dtype), rows.start * width)
        out, step = aligned(shape, self.dtype), max(views.PIECE // max(width, 1), 1)
        part = aligned((min(step, len(rows)), *self.shape[1:]), self.dtype)
        for start in range(0, len(rows), step):
            piece = self._filled(part[: len(rows) - start], (rows.start + start) * width)
            out[start : start + step] = piece[(slice(None), *(slice(each.start, each.stop) for each in rest))]
        return out

    def _filled(self, array: np.ndarray, start: int) -> np.ndarray:
        self._reader.read_into(self.name, start, array)
        return array


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Room for an array that `jax.device_put` takes over on CPU as it is: it copies what is not aligned to 64 bytes."""
    size, align = math.prod(shape) * np.dtype(dtype).itemsize, 64
    room = np.empty(size + align, np.uint8)
    start = -room.ctypes.data % align
    return room[start : start + size].view(dtype).reshape(shape)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: no file, no JSON, no object in it, or one with a key twice.
    """
    with _explained(file):
        if not file.is_file():
            raise CheckpointError(f"{file}: {_absence(file)}; {_hint(file)}")
        content = file.read_bytes()
    check_download(content[:HEAD], file)
    return parse_object(content, str(file))


def _hint(file: Path) -> str:
    """What to do where a JSON file is missing."""
    if file.name == CONFIG and file.with_name(DESCRIPTION).is_file():
        return f"it holds a model of your own ({DESCRIPTION}), which fp8x.load_into reads"
    if file.name == DESCRIPTION:
        if file.with_name(CONFIG).is_file():
            return "it is a Hugging Face directory, which fp8x.load reads"
        return "fp8x.save writes it for a model of your own"
    if snapshots := sorted(file.parent.glob(f"snapshots/*/{file.name}")):
        return (
            f"it is a model in the cache of huggingface_hub; give {' or '.join(str(each.parent) for each in snapshots)}"
        )
    return f"a Hugging Face directory has {CONFIG} beside its safetensors files"


def _read_config(path: Path, unread: dict[str, str]) -> dict[str, Any]:
    """config.json; adds to `unread` what says the same a second time, in another place."""
    config = read_json(path / CONFIG)
    places = {
        QUANTIZATION: config.pop(QUANTIZATION, None),
        OLDER: config.pop(OLDER, None),
    }  # compressed-tensors of 2024
    # Models of several parts may say it of their language model (Kimi-K2.5), where vLLM looks second.
    if isinstance(inner := config.get("text_config"), Mapping) and inner.get(QUANTIZATION) is not None:
        places[f"text_config.{QUANTIZATION}"] = inner[QUANTIZATION]
        config["text_config"] = {key: value for key, value in inner.items() if key != QUANTIZATION}
    stated = [place for place, value in places.items() if value is not None]
    if (path / LEGACY).is_file():  # ModelOpt, before 0.31 alone
        stated.append(LEGACY)
    if not stated:
        return config
    first, *others = stated
    value = _read_legacy(path) if first == LEGACY else places[first]
    config[QUANTIZATION] = Noted(value) if isinstance(value, Mapping) else value
    unread |= dict.fromkeys(others, f"{first} says how the source is quantized, and counts")
    return config


def model_type(config: Mapping[str, Any]) -> str | None:
    """Of the language model, which may be a part of another."""
    text = config.get("text_config")
    return (text.get("model_type") if isinstance(text, Mapping) else None) or config.get("model_type")


def _read_legacy(path: Path) -> dict[str, Any]:
    return {"quant_method": "modelopt"} | read_json(path / LEGACY)


def _listed_files(path: Path, unread: dict[str, str]) -> dict[str, Path]:
    """What the index says: tensor name -> file. Empty where one file holds everything. Adds to `unread` what else."""
    if (path / SINGLE).is_file():
        if (path / INDEX).is_file():
            unread[INDEX] = f"{SINGLE} holds everything"
        return {}
    if not (path / INDEX).is_file():
        for file in (path / SINGLE, path / INDEX):
            if os.path.lexists(file):
                raise CheckpointError(f"{file}: {_absence(file)}")
        there = sorted(f.name for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))
        found = f"found {', '.join(there[:4])}" if there else "found no weights"
        if part := unfinished(path / SINGLE) or unfinished(path / INDEX):
            found += f"; {part}"
        if any(name.endswith((".bin", ".pt", ".pth")) for name in there):
            found += (
                "; pickles are not read: load them with what wrote them and save safetensors (transformers 5 with "
                "torchao 0.15 does so for torchao's tensors too)"
            )
        raise CheckpointError(f"{path}: has neither {SINGLE} nor {INDEX}; {found}")
    index = read_json(path / INDEX)
    weight_map = index.pop("weight_map", None)
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{path / INDEX}: has no weight_map, an object of tensor name -> file name")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path / INDEX}: {name!a} lies in {file!a:.200}, which is not a file name")
        if file.endswith(".incomplete"):
            raise CheckpointError(f"{path / INDEX}: {name!a} lies in {file!a:.200}, whose download has not ended")
    for file in dict.fromkeys(weight_map.values()):
        if not (path / file).is_file():
            name = next(name for name, other in weight_map.items() if other == file)
            raise CheckpointError(f"{path / INDEX}: {name!a} lies in {file!a}, which {_absence(path / file)}")
    said = index.pop("metadata", {})
    further = {f"metadata.{key}" for key in said if key != "total_size"} if isinstance(said, Mapping) else {"metadata"}
    unread |= {f"{INDEX}.{key}": "the index is written anew" for key in (*index, *sorted(further))}
    return {name: path / file for name, file in weight_map.items()}


def _absence(file: Path) -> str:
    """Why there is no file."""
    if file.is_dir():
        return "is a directory"
    if file.is_symlink():
        return f"is a link to {os.readlink(file)}, which is missing"
    if file.exists():
        return "is no regular file"
    part = unfinished(file)
    return f"is missing; {part}" if part else "is missing"


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what the file system says into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
