"""What lies beside a destination while it is written, and after the one who wrote it was killed.

Both writers work in a hidden directory, which they lock: `Writer` in `.NAME.tmp-XXXXXXXX`, a new one each time,
`ResumableWriter` in `.NAME.partial`. It lies beside the destination, or in it where that is there already: it may be a
mount point, and no file goes from one file system to another by a new name. A lock ends with its process, so what
nobody holds nobody needs.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import warnings
from pathlib import Path

SCALES = "calibration-"  # how files in `.NAME.partial` begin that hold scales which are not written yet


def partial(path: Path) -> Path:
    """Where `ResumableWriter` writes what will be `path`."""
    return _home(path) / _partial_name(path)


def partials(path: Path) -> list[Path]:
    """Everywhere that an earlier `ResumableWriter` of `path` may have written: `path` may have come since."""
    return [home / _partial_name(path) for home in (path.parent, path)]


def temporary(path: Path) -> Path:
    """A new place for `Writer` to write what will be `path`."""
    return _home(path) / f".{path.name}.tmp-{secrets.token_hex(4)}"


def _home(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _partial_name(path: Path) -> str:
    return f".{path.name}.partial"


def leftovers(path: Path) -> list[Path]:
    """What either writer has left beside `path` or in it, or is writing there now."""
    pattern = re.compile(re.escape(f".{path.name}.tmp-") + "[0-9a-f]{8}")
    found: list[Path] = []
    for home in (path.parent, path):
        with contextlib.suppress(OSError):
            found += [
                other for other in home.iterdir() if other.name == _partial_name(path) or pattern.fullmatch(other.name)
            ]
    return sorted(found)


def sweep(path: Path, *, keep: Path | None = None) -> None:
    """Removes what killed runs have left beside `path` and in it, all but `keep`, with a warning that names it.

    What a living process holds stays. So does, with a warning, what can't be locked: nobody knows whether its writer
    lives.
    """
    removed, failed, unknown = [], [], []
    for left in leftovers(path):
        if left == keep:
            continue
        try:
            descriptor = lock(left)
        except (BlockingIOError, FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            unknown.append(described(left))
            continue
        try:
            what, is_empty = described(left), not any(left.iterdir())
            shutil.rmtree(left, ignore_errors=True)
            if left.exists():
                failed.append(what)
            elif not is_empty:
                removed.append(what)
        finally:
            os.close(descriptor)
    for found, message in (
        (removed, "removed what a run that was killed had left: {}"),
        (failed, "what a run that was killed has left can't be removed: {}"),
        (
            unknown,
            "this file system has no locks, so what another run has left stays: {}; remove it if none is writing",
        ),
    ):
        if found:
            warnings.warn(f"{path}: {message.format(', '.join(found))}", stacklevel=4)


def described(left: Path) -> str:
    """A leftover's name, and its size."""
    size = 0
    for directory, _, names in os.walk(left):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(directory, name)).st_size
    return f"{left} ({size:,} bytes)"


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
