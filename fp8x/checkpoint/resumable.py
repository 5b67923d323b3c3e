"""`ResumableWriter`: a checkpoint directory whose every byte has its place before the first is written.

So tensors come in any order, in pieces, from several threads, and what a killed run has written is known to the next.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fp8x.checkpoint import blocks
from fp8x.checkpoint.blocks import BlockFile, Disk
from fp8x.checkpoint.companions import copy_companions
from fp8x.checkpoint.destination import (
    DEFAULT_SHARD_BYTES,
    check_free,
    entries,
    explained,
    fill,
    fsync,
    place,
    real,
    write_json,
)
from fp8x.checkpoint.header import make_header, nbytes
from fp8x.checkpoint.journal import Journal
from fp8x.checkpoint.leftovers import SCALES, described, lock, partial, partials, sweep
from fp8x.checkpoint.reader import INDEX, SINGLE
from fp8x.errors import CheckpointError

FINISHED = "finished"  # says in the working directory that all is there, before the destination has its name

Specs = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype by safetensors' name, shape


class ResumableWriter:
    """Writes a checkpoint directory that is there completely or not at all, and goes on where a killed run stopped.

        with ResumableWriter(path, specs, identity) as writer:
            for name in specs:
                if not writer.has(name):
                    writer.write(name, 0, values)
            writer.add_json("config.json", config)

    Files lie in `.NAME.partial` beside the destination, or in it if it is there, empty. Each gets its final name when
    its last byte is on disk, and all of them their place at the end. An exception inside the block removes everything;
    being killed, or a KeyboardInterrupt, leaves files to the next run with the same `identity`, and of unfinished ones
    what is known to be on disk (`journal.py`). What other runs have left, of a `Writer` too, is removed with a warning
    (`leftovers.py`).

        .NAME.partial/out/       the destination, as it will be; unfinished files end in .tmp
        .NAME.partial/journal/   of each unfinished file
        .NAME.partial/plan       what the bytes follow from; a run with another takes nothing over
        .NAME.partial/finished   all is there, and moves to its place

    Arguments:
        path: the directory to make; it may exist if it is empty.
        specs: every tensor, in the order in which they will come: so they are dealt out to files.
        identity: what the bytes follow from. Files of a run with another are not used.
        max_shard_bytes: tensors go to several files, with an index, where one would be larger.
        files: the file of each tensor, in the place of that.
        index: with these: the index, where there is one.

    Attributes:
        work: where the files lie until they are all there.
        is_complete: whether a run with the same `identity` has finished `path` and was killed right after: nothing is
            to be done but to call `complete`.

    Raises:
        CheckpointError: `path` exists and is not an empty directory (it stays untouched), can't be written, is being
            written by another process, or is larger than what is free on its disk.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Specs,
        identity: Any,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        files: Mapping[str, str] | None = None,
        index: Mapping[str, Any] | None = None,
    ):
        self.path = real(path)
        finished = _find_finished(self.path)
        self.work = partial(self.path)
        self._shards, self._index = _deal(specs, max_shard_bytes) if files is None else _placed(specs, files), index
        self._shard_of = {name: shard for shard in self._shards for name in shard.offsets}
        self._plan = hashlib.sha256(
            json.dumps([identity, list(specs.items()), max_shard_bytes, files, index], default=str).encode()
        ).hexdigest()
        self._lock = threading.Lock()
        self.is_complete = finished is not None and finished[1] == self._plan
        if self.is_complete:
            self.work = finished[0]
        else:
            self._remove_empty()
            check_free(self.path)

    @property
    def _out(self) -> Path:
        return self.work / "out"

    @property
    def _journals(self) -> Path:
        return self.work / "journal"

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(shard.size - shard.start for shard in self._shards)

    def __enter__(self) -> "ResumableWriter":
        with explained(self.path):
            check_free(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._take()
        try:
            with explained(self.path):
                sweep(self.path, keep=self.work)
                self._continue()
                self._check_space()
        except BaseException:
            self._let_go()
            raise
        self._disk = Disk()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        is_kept = kind is KeyboardInterrupt
        try:
            if kind is None:
                for shard in self._shards:
                    if shard.is_filled and not shard.is_finished:
                        with explained(self.path):
                            shard.open(self._out, self._disk)
            self._disk.close()
            with explained(self.path):
                for shard in self._shards:
                    shard.close(is_kept=is_kept)
            if kind is None:
                with explained(self.path):
                    self._disk.check()
                    self._finish()
        except BaseException as raised:
            kind, is_kept = type(raised), isinstance(raised, KeyboardInterrupt)
            raise
        finally:
            if kind is not None and not is_kept:
                shutil.rmtree(self.work, ignore_errors=True)
            self._let_go()

    def has(self, name: str) -> bool:
        """Whether an earlier run has written a tensor."""
        return self._shard_of[name].has(name)

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes a part of a tensor, `start` bytes from its beginning. Each byte is to be written once; nothing happens
        where an earlier run has done it.
        """
        if self.has(name):
            return
        shard, data = self._shard_of[name], np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        with explained(self.path):
            with self._lock:
                file = shard.open(self._out, self._disk)
            file.write(shard.offsets[name] + start, data)

    def add_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Adds a JSON file."""
        with explained(self.path):
            write_json(self._out / name, value)

    def copy_companions(self, source: Path) -> None:
        """Copies what lies beside the weights in another checkpoint's directory (`companions.py`)."""
        with explained(self.path):
            copy_companions(source, self._out)

    def _take(self) -> int | None:
        """Makes the working directory and locks it; None on a file system without locks."""
        while True:
            self.work.mkdir(exist_ok=True)
            try:
                return lock(self.work)
            except BlockingIOError:
                raise CheckpointError(f"{self.path}: another process is writing it ({self.work})") from None
            except FileNotFoundError:
                continue  # another process has just finished
            except OSError:
                return None

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _remove_empty(self) -> None:
        """All that is left of a run that was killed when it had removed everything else."""
        for left in partials(self.path):
            with contextlib.suppress(OSError):
                descriptor = lock(left)  # else it may be another's, who has just made it
                try:
                    left.rmdir()
                finally:
                    os.close(descriptor)

    def _continue(self) -> None:
        """Takes over what a run with the same plan has finished, and removes anything else."""
        plan, others = self.work / "plan", (file.name for file in self.work.iterdir())
        is_begun = not all(name.startswith(SCALES) for name in others)
        is_ours = plan.is_file() and plan.read_text() == self._plan
        if is_begun and self._descriptor is None:
            self._without_locks(is_ours)
        if not is_ours:
            if self._out.exists():
                what, is_empty = described(self.work), not any(self._out.iterdir())
                shutil.rmtree(self._out)
                shutil.rmtree(self._journals, ignore_errors=True)
                fsync(self.work)
                if not is_empty:
                    warnings.warn(
                        f"{self.path}: removed what a run with other arguments had left: {what}", stacklevel=4
                    )
            plan.write_text(self._plan)
            fsync(plan)
        (self.work / FINISHED).unlink(missing_ok=True)
        self._out.mkdir(exist_ok=True)
        for shard in self._shards:
            shard.take_over(self._out, self._journals)
        ours = {file for shard in self._shards for file in shard.taken_over}
        for file in set(self._out.iterdir()) - ours:
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _without_locks(self, is_ours: bool) -> None:
        """Where nobody knows whether another process is writing."""
        what = f"{described(self.work)} is what another run has left, or is writing: this file system has no locks"
        if not is_ours:
            raise CheckpointError(f"{self.path}: {what}; remove it if no process is writing there, or write elsewhere")
        warnings.warn(f"{self.path}: {what}; it is taken for the former, and the run goes on there", stacklevel=5)

    def _check_space(self) -> None:
        taken = sum(512 * file.stat().st_blocks for shard in self._shards for file in shard.taken_over)
        needed = sum(shard.size for shard in self._shards) - taken
        free = shutil.disk_usage(self._out).free
        if needed > free:
            if not any(shard.taken_over for shard in self._shards):
                shutil.rmtree(self.work)
            raise CheckpointError(
                f"{self.path}: needs {needed:,} bytes, but {free:,} are free on its disk; make room, or write elsewhere"
            )

    def _finish(self) -> None:
        if missing := [shard.file for shard in self._shards if not shard.is_finished]:
            raise CheckpointError(f"{self.path}: {', '.join(missing[:3])} got less than was planned")
        if self._index is not None:
            self.add_json(INDEX, self._index)
        elif len(self._shards) > 1:
            weight_map = {name: shard.file for shard in self._shards for name in shard.offsets}
            self.add_json(INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": weight_map})
        for file in self._out.iterdir():
            if file.suffix != ".safetensors":
                fsync(file)
        fsync(self._out)
        write_json(self.work / FINISHED, {"plan": self._plan, "files": _files(self._out)})
        fsync(self.work / FINISHED)
        fsync(self.work)
        place(self._out, self.path)
        self.tidy()

    def complete(self) -> None:
        """Does what little a run that was killed at its very end has left to do.

        Raises:
            CheckpointError: another process is at it.
        """
        descriptor = self._take()
        try:
            with explained(self.path):
                if self._out.is_dir():
                    fill(self._out, self.path)
            self.tidy()
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def tidy(self) -> None:
        """Removes what is left of the work on a complete destination; what says that it is complete last."""
        with contextlib.suppress(OSError):
            for file in self.work.iterdir():
                if file.name != FINISHED:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
            (self.work / FINISHED).unlink()
            self.work.rmdir()


def finished_plan(path: Path) -> str | None:
    """The plan of the run that has made `path` and was killed before it had removed its working directory; else None.

    Files keep their number, size and time when they, or the directory that they lie in, are renamed, so no others of
    these names are taken for those that the run has made.
    """
    found = _find_finished(real(path))
    return found and found[1]


def _find_finished(path: Path) -> tuple[Path, str] | None:
    """The working directory of such a run, and its plan. Some files may still lie there."""
    for work in partials(path):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or half of one
            found, out = json.loads((work / FINISHED).read_text()), work / "out"
            if found["files"] == _files(path) | (_files(out) if out.is_dir() else {}):
                return work, found["plan"]
    return None


def _files(directory: Path) -> dict[str, list[int]]:
    """What tells the files of a directory from others of their names."""
    found = {}
    for entry in entries(directory):
        stat = entry.lstat()
        found[entry.name] = [stat.st_ino, *([] if entry.is_dir() else [stat.st_size, stat.st_mtime_ns])]
    return found


class _Shard:
    """One safetensors file.

    Attributes:
        file: its name when it is finished.
        offsets: where each tensor begins in the file.
        start: where the first does: after the header.
        size: of the file.
        is_finished: whether it has its name; was_finished: from an earlier run.
        taken_over: the file that an earlier run has left, finished or not; empty without one.
    """

    def __init__(self, file: str, specs: Specs):
        self.file = file
        self._header, self.offsets = make_header(specs)
        self.start = len(self._header)
        self.size = self.start + sum(nbytes(*spec) for spec in specs.values())
        self.is_finished = self.was_finished = False
        self.taken_over: list[Path] = []
        self._ends = {name: self.offsets[name] + nbytes(*spec) for name, spec in specs.items()}
        self._journal: Journal | None = None  # of the unfinished file
        self._open: BlockFile | None = None

    def take_over(self, directory: Path, journals: Path) -> None:
        """Looks what an earlier run with the same plan has left."""
        finished, unfinished = directory / self.file, self._unfinished(directory)
        self.is_finished = self.was_finished = finished.is_file() and finished.stat().st_size == self.size
        self._journal = Journal(journals / self.file, unfinished, blocks.BLOCK, self.size)
        self.taken_over = [finished] if self.is_finished else [unfinished] if self._journal.blocks else []

    def has(self, name: str) -> bool:
        """Whether an earlier run has written a tensor."""
        if not self.taken_over:
            return False
        needed = range(self.offsets[name] // blocks.BLOCK, -(-self._ends[name] // blocks.BLOCK))
        return self.was_finished or self._journal.blocks.issuperset(needed)

    @property
    def is_filled(self) -> bool:
        """Whether no tensor is missing, so that nobody will write one."""
        return self.size == self.start or all(map(self.has, self.offsets))

    def open(self, directory: Path, disk: Disk) -> BlockFile:
        """The unfinished file, which is made when it is first asked for."""
        if self._open is None:
            unfinished = self._unfinished(directory)

            def finish() -> None:
                os.rename(unfinished, directory / self.file)
                fsync(directory)
                self.is_finished = True

            self._open = BlockFile(unfinished, self.size, disk, finish, self._journal)
            self._open.write(0, np.frombuffer(self._header, np.uint8))
        return self._open

    def close(self, *, is_kept: bool) -> None:
        if self._open is not None:
            if is_kept:
                self._open.sync()
            self._open.close()

    def _unfinished(self, directory: Path) -> Path:
        return directory / f"{self.file}.tmp"


def _deal(specs: Specs, max_bytes: int) -> list[_Shard]:
    """Tensors to files, in their order."""
    if max_bytes < 1:
        raise CheckpointError(f"max_shard_bytes: {max_bytes} does not fit; use a positive number of bytes")
    parts: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in specs.items():
        needed = nbytes(dtype, shape)
        if parts[-1] and size + needed > max_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = (dtype, shape)
        size += needed
    if len(parts) == 1:
        return [_Shard(SINGLE, parts[0])]
    return [_Shard(f"model-{i:05}-of-{len(parts):05}.safetensors", part) for i, part in enumerate(parts, 1)]


def _placed(specs: Specs, files: Mapping[str, str]) -> list[_Shard]:
    """Tensors to these files."""
    parts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, spec in specs.items():
        parts.setdefault(files[name], {})[name] = spec
    return [_Shard(file, part) for file, part in parts.items()]
