"""`Writer`: a Hugging Face directory that is there completely or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fp8x.checkpoint.reader import INDEX, SINGLE
from fp8x.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 * 10**9

# What lies beside the weights and stays true of them in any format.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)


class Writer:
    """Writes a checkpoint directory, atomically: into a temporary sibling, which is renamed when everything is on disk.

        with Writer(path) as writer:
            writer.add("model.norm.weight", scale)
            writer.add_json("config.json", config)

    An exception inside the block removes what was written.

    Arguments:
        path: the directory to make; it may exist if it is empty.
        max_shard_bytes: tensors go to several files, with an index, where one would be larger. Only one file's tensors
            are held at a time.

    Raises:
        CheckpointError: `path` exists and is not an empty directory (it stays untouched), or can't be written.
    """

    def __init__(self, path: str | Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES):
        self.path = Path(os.path.realpath(Path(path).expanduser()))
        if max_shard_bytes < 1:
            raise CheckpointError(f"max_shard_bytes: {max_shard_bytes} does not fit; use a positive number of bytes")
        self._check_free()
        self._max_shard_bytes = max_shard_bytes
        self._temporary = self.path.with_name(f".{self.path.name}.tmp-{secrets.token_hex(4)}")
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []  # per file written: tensor name -> bytes

    def __enter__(self) -> "Writer":
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.mkdir()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                with _explained(self.path):
                    self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def add(self, name: str, array: jax.Array | np.ndarray) -> None:
        """Adds a tensor; written once a shard is full."""
        if name in self._pending or any(name in shard for shard in self._shards):
            raise CheckpointError(f"{name}: added twice to {self.path}")
        array = np.asarray(array, order="C")
        if self._pending and self._pending_bytes + array.nbytes > self._max_shard_bytes:
            with _explained(self.path):
                self._write_shard()
        self._pending[name] = array
        self._pending_bytes += array.nbytes

    def add_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Adds a JSON file."""
        with _explained(self.path):
            (self._temporary / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def copy_companions(self, source: Path) -> None:
        """Copies tokenizer, generation settings and licence from another checkpoint's directory."""
        with _explained(self.path):
            for file in {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}:
                shutil.copyfile(file, self._temporary / file.name)

    def _check_free(self) -> None:
        if self.path.is_dir() and not any(self.path.iterdir()):
            return
        if os.path.lexists(self.path):
            what = "is not empty" if self.path.is_dir() else "is a file"
            raise CheckpointError(f"{self.path}: exists and {what}; it is left as it is. Remove it, or write elsewhere")

    def _write_shard(self) -> None:
        self._shards.append({name: array.nbytes for name, array in self._pending.items()})
        file = self._temporary / _shard_name(len(self._shards))
        # transformers refuses files that do not name a framework.
        save_file(self._pending, file, metadata={"format": "pt"})
        # safetensors writes for the owner alone; others may read what they may read beside it.
        file.chmod(self._temporary.stat().st_mode & 0o666)
        self._pending, self._pending_bytes = {}, 0

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
            _fsync(file)
        self._check_free()
        os.rename(self._temporary, self.path)
        _fsync(self.path.parent)


def _shard_name(number: int) -> str:
    return f"shard-{number:05}.safetensors"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what the file system says into a CheckpointError that names the destination."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be written: {error}; nothing is left of it") from error
