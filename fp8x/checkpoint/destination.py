"""What everything that writes a directory has to see to: that nothing is there, that errors say where, companions."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fp8x.checkpoint.companions import check_companions
from fp8x.checkpoint.leftovers import leftovers, partial
from fp8x.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 * 10**9


def check_free(path: Path) -> None:
    """Raises CheckpointError unless nothing is at `path`, or an empty directory that can be replaced."""
    if path.is_mount():
        raise CheckpointError(f"{path}: is a mount point, which can't be replaced; name a directory in it")
    if path.is_dir() and not any(path.iterdir()):
        return
    if os.path.lexists(path):
        what = "is not empty" if path.is_dir() else "is a file"
        raise CheckpointError(f"{path}: exists and {what}; it is left as it is. Remove it, or write elsewhere")


def check_writable(path: Path) -> None:
    """Raises CheckpointError, before any work, unless a directory can be made at `path`, and one beside it."""
    path = Path(os.path.realpath(path.expanduser()))
    parent = next(parent for parent in path.parents if os.path.lexists(parent))
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(partial(path))  # a name that is too long
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written: {parent}: {error.strerror}; write elsewhere") from None


def check_source(source: Path, path: Path) -> None:
    """Refuses a source that writing at `path` would change, and one whose companions are damaged.

    Raises:
        CheckpointError: one is inside the other, by whatever links and mounts; `source` lies in what a killed run left
            beside `path`, which is cleared; or a tokenizer or the like that is something else (`downloads.py`).
    """
    path, source = Path(os.path.realpath(path.expanduser())), Path(os.path.realpath(source))
    if _is_within(path, source) or _is_within(source, path):
        where = "lies in" if _is_within(path, source) else "holds"
        where = "is" if _is_within(path, source) and _is_within(source, path) else where
        raise CheckpointError(f"{path}: {where} the source, {source}, which would be changed; write elsewhere")
    for left in leftovers(path):
        if _is_within(source, left):
            raise CheckpointError(f"{source}: lies in {left}, which is cleared; move it, or write elsewhere")
    check_companions(source)


def _is_within(path: Path, directory: Path) -> bool:
    """Whether `path` is a directory or lies in it; neither need exist."""
    try:
        there = directory.stat()
    except OSError:
        return False
    for parent in (path, *path.parents):
        with contextlib.suppress(OSError):  # not made yet
            if os.path.samestat(parent.stat(), there):
                return True
    return False


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
