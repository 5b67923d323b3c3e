"""What everything that writes a directory has to see to: that nothing is there, how it gets there, what errors say."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fp8x.checkpoint.companions import check_companions
from fp8x.checkpoint.leftovers import leftovers, lock, partial
from fp8x.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 * 10**9


_DESCRIPTIONS = ("config.json", "fp8x.json")  # without one of which nobody reads a directory


def real(path: str | Path) -> Path:
    """Where a destination lies, by whatever links.

    Raises:
        CheckpointError: a link to nothing, or a path in a working directory that is gone.
    """
    path = Path(path).expanduser()
    try:
        found = Path(os.path.realpath(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the working directory is gone; change to one that is there") from None
    if path.is_symlink() and not found.is_dir():
        what = "is a file" if os.path.lexists(found) else "is not there"
        raise CheckpointError(f"{path}: is a link to {found}, which {what}; remove the link, or write elsewhere")
    return found


def check_free(path: Path) -> None:
    """Raises CheckpointError unless nothing is at `path`, or a directory in which nothing is."""
    if path.is_dir() and not list(entries(path)):
        return
    if os.path.lexists(path):
        what = "is not empty" if path.is_dir() else "is a file"
        raise CheckpointError(f"{path}: exists and {what}; it is left as it is. Remove it, or write elsewhere")


def entries(path: Path) -> Iterator[Path]:
    """What a directory holds, besides what writers have left or are at, and what a file system has in its root."""
    ours = leftovers(path)
    return (entry for entry in path.iterdir() if entry not in ours and entry.name != "lost+found")


def place(made: Path, path: Path) -> None:
    """Moves a directory that is complete, and on disk, to where it belongs.

    Raises:
        CheckpointError: something is there; it stays untouched.
    """
    check_free(path)
    if path.is_dir():
        fill(made, path)
        return
    try:
        os.rename(made, path)
    except OSError:
        check_free(path)  # says more, where another writer came first
        raise
    fsync(path.parent)


def fill(made: Path, path: Path) -> None:
    """Moves the contents of one directory into another, which stays what it is: somebody's working directory, a mount
    point. What makes it a checkpoint comes last; if anything fails all goes back.
    """
    moved: list[Path] = []
    with _held(path):
        try:
            for entry in sorted(made.iterdir(), key=lambda entry: (entry.name in _DESCRIPTIONS, entry.name)):
                if os.path.lexists(path / entry.name):
                    raise CheckpointError(f"{path / entry.name}: exists; it is left as it is. Write elsewhere")
                os.rename(entry, path / entry.name)
                moved.append(entry)
            fsync(path)
        except BaseException:
            for entry in moved:
                os.rename(path / entry.name, entry)
            raise
    made.rmdir()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keeps other writers from filling a directory meanwhile, where its file system has locks."""
    try:
        descriptor = lock(path)
    except BlockingIOError:
        raise CheckpointError(f"{path}: another process is writing it") from None
    except OSError:
        descriptor = None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raises CheckpointError, before any work, unless a directory can be made at `path`, and what is written before."""
    parent = next(parent for parent in partial(path).parents if os.path.lexists(parent))
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
    path, source = real(path), Path(os.path.realpath(source))
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
