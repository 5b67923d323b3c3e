"""What everything that writes a directory has to see to: that nothing is there, that errors say where, companions."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fp8x.checkpoint.downloads import check_file
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
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "LICENSE*",
)


def check_free(path: Path) -> None:
    """Raises CheckpointError unless nothing is at `path`, or an empty directory that can be replaced."""
    if path.is_mount():
        raise CheckpointError(f"{path}: is a mount point, which can't be replaced; name a directory in it")
    if path.is_dir() and not any(path.iterdir()):
        return
    if os.path.lexists(path):
        what = "is not empty" if path.is_dir() else "is a file"
        raise CheckpointError(f"{path}: exists and {what}; it is left as it is. Remove it, or write elsewhere")


def lock(directory: Path) -> int:
    """Locks a directory until the descriptor is closed.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: another process has removed it.
        OSError: it can't be locked.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), directory.stat()):
            raise FileNotFoundError(f"{directory}: another has taken its place")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_companions(source: Path) -> None:
    """Refuses what `copy_companions` would copy, but is something else in a file's place (`downloads.py`)."""
    for file in _companions(source):
        if not file.name.startswith("LICENSE"):  # may be a web page
            check_file(file)


def copy_companions(source: Path, directory: Path) -> None:
    """Copies tokenizer, generation settings and licence from another checkpoint's directory."""
    for file in _companions(source):
        shutil.copyfile(file, directory / file.name)


def _companions(source: Path) -> list[Path]:
    return sorted({file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()})


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the file system says into a CheckpointError that names the destination."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be written: {error}; nothing is left of it") from error
