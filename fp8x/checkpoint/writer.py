"""`Writer`: a Hugging Face directory that is there completely or not at all."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8x.checkpoint.companions import copy_companions
from fp8x.checkpoint.destination import (
    DEFAULT_SHARD_BYTES,
    check_free,
    explained,
    fsync,
    place,
    real,
    write_json,
)
from fp8x.checkpoint.header import DTYPE_NAMES, make_header
from fp8x.checkpoint.leftovers import lock, sweep, temporary
from fp8x.checkpoint.reader import INDEX, SINGLE
from fp8x.errors import CheckpointError

if TYPE_CHECKING:
    import jax


class Writer:
    """Writes a checkpoint directory, completely or not at all: files lie elsewhere until everything is on disk.

        with Writer(path) as writer:
            writer.add("model.norm.weight", scale)
            writer.add_json("config.json", config)

    An exception inside the block removes what was written; what a killed process left is removed by the next writer of
    the same `path`, a `ResumableWriter` too, with a warning (`leftovers.py`).

    Arguments:
        path: the directory to make; it may exist if it is empty.
        max_shard_bytes: tensors go to several files, with an index, where one would be larger. Only one file's tensors
            are held at a time.
        progress: called after every tensor with the bytes written.

    Raises:
        CheckpointError: `path` exists and is not an empty directory (it stays untouched), or can't be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        progress: Callable[[int], None] | None = None,
    ):
        self.path = real(path)
        if max_shard_bytes < 1:
            raise CheckpointError(f"max_shard_bytes: {max_shard_bytes} does not fit; use a positive number of bytes")
        check_free(self.path)
        self._max_shard_bytes = max_shard_bytes
        self._progress = progress
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = self._written_bytes = 0
        self._shards: list[dict[str, int]] = []  # per file written: tensor name -> bytes

    def __enter__(self) -> "Writer":
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sweep(self.path)
            self._temporary, self._lock = _make_temporary(self.path)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                with explained(self.path):
                    self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)

    def add(self, name: str, array: "jax.Array | np.ndarray") -> None:
        """Adds a tensor; written once a shard is full."""
        if name in self._pending or any(name in shard for shard in self._shards):
            raise CheckpointError(f"{name}: added twice to {self.path}")
        array = np.asarray(array, order="C")
        if array.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{name}: dtype is {array.dtype}; use one of {', '.join(map(str, DTYPE_NAMES))}")
        if self._pending and self._pending_bytes + array.nbytes > self._max_shard_bytes:
            with explained(self.path):
                self._write_shard()
        self._pending[name] = array
        self._pending_bytes += array.nbytes

    def add_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Adds a JSON file."""
        with explained(self.path):
            write_json(self._temporary / name, value)

    def copy_companions(self, source: Path) -> None:
        """Copies what lies beside the weights in another checkpoint's directory (`companions.py`)."""
        with explained(self.path):
            copy_companions(source, self._temporary)

    def _write_shard(self) -> None:
        self._shards.append({name: array.nbytes for name, array in self._pending.items()})
        specs = {name: (DTYPE_NAMES[array.dtype], array.shape) for name, array in self._pending.items()}
        header, offsets = make_header(specs)
        with (self._temporary / _shard_name(len(self._shards))).open("xb") as file:
            file.write(header)
            for name in offsets:
                array = self._pending.pop(name)
                file.write(array.reshape(-1).view(np.uint8))
                self._written_bytes += array.nbytes
                if self._progress is not None:
                    self._progress(self._written_bytes)
        self._pending_bytes = 0

    def _finish(self) -> None:
        if self._pending or not self._shards:
            self._write_shard()
        total = len(self._shards)
        weight_map = {}
        for number, shard in enumerate(self._shards, 1):
            final = SINGLE if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"
            (self._temporary / _shard_name(number)).rename(self._temporary / final)
            weight_map |= dict.fromkeys(shard, final)
        if total > 1:
            size = sum(sum(shard.values()) for shard in self._shards)
            self.add_json(INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        for file in [*self._temporary.iterdir(), self._temporary]:
            fsync(file)
        place(self._temporary, self.path)


def _make_temporary(path: Path) -> tuple[Path, int | None]:
    """A hidden directory, and the descriptor of a lock on it that lasts as long as this process."""
    while True:
        directory = temporary(path)
        directory.mkdir()
        try:
            return directory, lock(directory)
        except (BlockingIOError, FileNotFoundError):
            pass  # a sweeping writer came between
        except OSError:
            return directory, None  # a file system without locks; nobody sweeps there


def _shard_name(number: int) -> str:
    return f"shard-{number:05}.safetensors"
