"""Bytes of a file into memory: as they lie, or as a `View` of them says."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fp8x.checkpoint.header import DTYPES, Stored
from fp8x.checkpoint.packed import unpack
from fp8x.errors import CheckpointError

PIECE = 1 << 23  # bytes of one call to the system, between which Ctrl-C is heard
BAND = 1 << 19  # bytes of rows that lie among others: they go through a buffer that stays in cache


class OpenFile:
    """An open file, closed with the last reference: no thread reads from a descriptor that is another's by now."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):  # bound here: at the interpreter's end modules are emptied first
        close(self.descriptor)


def read_bytes(file: OpenFile, tensor: Stored, name: str, offset: int, buffer: np.ndarray) -> None:
    view = memoryview(buffer.reshape(-1).view(np.uint8))
    while view:
        if not (count := os.preadv(file.descriptor, [view[:PIECE]], offset)):
            raise CheckpointError(f"{tensor.file}: ends before {name} does; it has changed since it was opened")
        view, offset = view[count:], offset + count


def read_columns(file: OpenFile, tensor: Stored, name: str, start: int, buffer: np.ndarray) -> None:
    """Whole rows of a matrix `[N, K]` that lies transposed: a piece of each of K rows of the file."""
    size, k, view = DTYPES[tensor.dtype].itemsize, tensor.shape[1], tensor.view
    rows = buffer.reshape(-1).view(f"u{size}").reshape(-1, k)
    first = view.first + start // (k * size) * view.step
    band = np.empty((k, (len(rows) - 1) * view.step + 1), rows.dtype)
    for row in range(k):
        read_bytes(file, tensor, name, tensor.start + (row * view.lines + first) * size, band[row])
    rows[:] = band[:, :: view.step].T


def lie_in_turn(tensors: Sequence[Stored]) -> bool:
    """Whether they are of one shape, and rows of the same bytes."""
    where = {(t.file, t.start, t.stop, t.shape, t.view and dataclasses.replace(t.view, first=0)) for t in tensors}
    return len(where) == 1 and tensors[0].view is not None and not tensors[0].view.is_transposed


def read_rows(file: OpenFile, tensors: Sequence[Stored], name: str, start: int, buffers: Sequence[np.ndarray]) -> None:
    """Whole rows of a matrix that lie among others, or in 4 bits; some at a time. Or of several that lie in turn."""
    tensor, view, row = tensors[0], tensors[0].view, tensors[0].row_bytes
    wholes = [buffer.reshape(-1).view(np.uint8).reshape(-1, row) for buffer in buffers]
    line, count = row // 2 if view.is_packed else row, len(wholes[0])
    first, last = (choose(each.view.first for each in tensors) for choose in (min, max))
    at_once = min(max(BAND // max(line * view.step, 1), 1), count)
    band = np.empty((at_once * view.step + last - first, line), np.uint8)
    for done in range(0, count, at_once):
        size = min(at_once, count - done)
        lines = band[: (size - 1) * view.step + 1 + last - first]
        read_bytes(file, tensor, name, tensor.start + (first + (start // row + done) * view.step) * line, lines)
        for each, whole in zip(tensors, wholes, strict=True):
            part, mine = whole[done : done + size], lines[each.view.first - first :: view.step][:size]
            if view.is_packed:
                unpack(mine, part)
            else:
                part[:] = mine
