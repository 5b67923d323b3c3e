"""`Journal`: which blocks of an unfinished file are on disk for sure, so that the next run need not write them again.

A line names blocks, and is written after an `fsync` of the file has returned, so what it says is true after a power cut
too, when the page cache is lost. Only the last line can be torn then; it is left out.
"""

import contextlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from fp8x.checkpoint.destination import fsync


class Journal:
    """
    Arguments:
        path: where it lies; it need not exist.
        file: that it is of.
        block: bytes; the last block of the file may have fewer.
        size: of the file.

    Attributes:
        blocks: that an earlier run has written; none where the file is not the one that it wrote.
    """

    def __init__(self, path: Path, file: Path, block: int, size: int):
        self._path, self._file, self._block, self._size = path, file, block, size
        self.blocks = frozenset(self._read())
        self._is_begun = bool(self.blocks)

    def add(self, blocks: Collection[int]) -> None:
        """Notes blocks, which are on disk."""
        if not self._is_begun:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("w") as file:
                file.write(json.dumps(self._about()) + "\n")
            for directory in (self._file.parent, self._path.parent, self._path.parent.parent):
                fsync(directory)
            self._is_begun = True
        with self._path.open("a") as file:
            file.write(json.dumps(sorted(blocks)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _about(self) -> dict[str, int]:
        """What the lines rest on."""
        return {"inode": self._file.stat().st_ino, "block": self._block, "size": self._size}

    def _read(self) -> set[int]:
        found: set[int] = set()
        with contextlib.suppress(OSError, ValueError, TypeError):  # there is none, or it ends in half a line
            about, *lines = self._path.read_bytes().splitlines()
            if json.loads(about) != self._about():
                return found
            if self._file.stat().st_size < self._size:
                return found
            for line in lines:
                found.update(json.loads(line))
        return found
