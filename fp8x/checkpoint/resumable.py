"""`ResumableWriter`: a checkpoint directory whose every byte has its place before the first is written.

So tensors come in any order, in pieces, from several threads, and what a killed run has finished is known to the next.
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

from fp8x.checkpoint.blocks import BlockFile, Disk
from fp8x.checkpoint.companions import copy_companions
from fp8x.checkpoint.destination import (
    DEFAULT_SHARD_BYTES,
    check_free,
    explained,
    fsync,
    write_json,
)
from fp8x.checkpoint.header import make_header, nbytes
from fp8x.checkpoint.leftovers import SCALES, described, lock, partial, sweep
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

    Files lie in `.NAME.partial` beside the destination. Each gets its final name when its last byte is on disk; the
    directory gets its own at the end. An exception inside the block removes everything; being killed, or a
    KeyboardInterrupt, leaves the finished files to the next run with the same `identity`. What other runs have left,
    of a `Writer` too, is removed with a warning (`leftovers.py`).

    Arguments:
        path: the directory to make; it may exist if it is empty.
        specs: every tensor, in the order in which they will come: so they are dealt out to files.
        identity: what the bytes follow from. Files of a run with another are not used.
        max_shard_bytes: tensors go to several files, with an index, where one would be larger.

    Attributes:
        work: where the files lie until they are all there.
        is_complete: whether a run with the same `identity` has finished `path` and was killed right after: nothing is
            to be done but to call `tidy`.

    Raises:
        CheckpointError: `path` exists and is not an empty directory (it stays untouched), can't be written, is being
            written by another process, or is larger than what is free on its disk.
    """

    def __init__(self, path: str | Path, specs: Specs, identity: Any, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES):
        self.path = Path(os.path.realpath(Path(path).expanduser()))
        self.work = partial(self.path)
        self._out = self.work / "out"
        self._shards = _deal(specs, max_shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.offsets}
        self._plan = hashlib.sha256(
            json.dumps([identity, list(specs.items()), max_shard_bytes], default=str).encode()
        ).hexdigest()
        self._lock = threading.Lock()
        self.is_complete = finished_plan(self.path) == self._plan
        if not self.is_complete:
            self._remove_empty()
            check_free(self.path)

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
                    if shard.is_empty and not shard.is_finished:
                        with explained(self.path):
                            shard.open(self._out, self._disk)
            self._disk.close()
            for shard in self._shards:
                shard.close()
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
        """Whether a tensor lies in a file that an earlier run finished."""
        return self._shard_of[name].is_taken_over

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
        with contextlib.suppress(OSError):
            descriptor = lock(self.work)  # else it may be another's, who has just made it
            try:
                self.work.rmdir()
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
                if not is_empty:
                    warnings.warn(
                        f"{self.path}: removed what a run with other arguments had left: {what}", stacklevel=4
                    )
            plan.write_text(self._plan)
        (self.work / FINISHED).unlink(missing_ok=True)
        self._out.mkdir(exist_ok=True)
        sizes = {shard.file: shard.size for shard in self._shards}
        for file in self._out.iterdir():
            if sizes.get(file.name) != file.stat().st_size:
                file.unlink()
        for shard in self._shards:
            shard.is_taken_over = shard.is_finished = (self._out / shard.file).is_file()

    def _without_locks(self, is_ours: bool) -> None:
        """Where nobody knows whether another process is writing."""
        what = f"{described(self.work)} is what another run has left, or is writing: this file system has no locks"
        if not is_ours:
            raise CheckpointError(f"{self.path}: {what}; remove it if no process is writing there, or write elsewhere")
        warnings.warn(f"{self.path}: {what}; it is taken for the former, and the run goes on there", stacklevel=5)

    def _check_space(self) -> None:
        needed = sum(shard.size for shard in self._shards if not shard.is_finished)
        free = shutil.disk_usage(self._out).free
        if needed > free:
            if not any(shard.is_finished for shard in self._shards):
                shutil.rmtree(self.work)
            raise CheckpointError(
                f"{self.path}: needs {needed:,} bytes, but {free:,} are free on its disk; make room, or write elsewhere"
            )

    def _finish(self) -> None:
        if missing := [shard.file for shard in self._shards if not shard.is_finished]:
            raise CheckpointError(f"{self.path}: {', '.join(missing[:3])} got less than was planned")
        if len(self._shards) > 1:
            weight_map = {name: shard.file for shard in self._shards for name in shard.offsets}
            self.add_json(INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": weight_map})
        for file in self._out.iterdir():
            if file.suffix != ".safetensors":
                fsync(file)
        fsync(self._out)
        check_free(self.path)
        write_json(self.work / FINISHED, {"plan": self._plan, "files": _files(self._out)})
        fsync(self.work / FINISHED)
        fsync(self.work)
        os.rename(self._out, self.path)
        fsync(self.path.parent)
        self.tidy()

    def tidy(self) -> None:
        """Removes what is left beside a complete destination; what says that it is complete last."""
        with contextlib.suppress(OSError):
            for file in self.work.iterdir():
                if file.name != FINISHED:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
            (self.work / FINISHED).unlink()
            self.work.rmdir()


def finished_plan(path: Path) -> str | None:
    """The plan of the run that has made `path` and was killed before it had removed its working directory; else None.

    Files keep their number, size and time when the directory that they lie in is renamed, so no other directory of that
    name is taken for the one that the run has made.
    """
    path = Path(os.path.realpath(path.expanduser()))
    try:
        found = json.loads((partial(path) / FINISHED).read_text())
        return found["plan"] if found["files"] == _files(path) else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or half of one
        return None


def _files(directory: Path) -> dict[str, list[int]]:
    """What tells the files of a directory from others of their names."""
    found = {file.name: file.lstat() for file in directory.iterdir()}
    return {name: [stat.st_ino, stat.st_size, stat.st_mtime_ns] for name, stat in sorted(found.items())}


class _Shard:
    """One safetensors file.

    Attributes:
        file: its name when it is finished.
        offsets: where each tensor begins in the file.
        start: where the first does: after the header.
        size: of the file.
        is_finished: whether it has its name; is_taken_over: from an earlier run.
    """

    def __init__(self, file: str, specs: Specs):
        self.file = file
        self._header, self.offsets = make_header(specs)
        self.start = len(self._header)
        self.size = self.start + sum(nbytes(*spec) for spec in specs.values())
        self.is_empty = self.size == self.start
        self.is_finished = self.is_taken_over = False
        self._open: BlockFile | None = None

    def open(self, directory: Path, disk: Disk) -> BlockFile:
        """The unfinished file, which is made when it is first asked for."""
        if self._open is None:
            unfinished = directory / f"{self.file}.tmp"

            def finish() -> None:
                os.rename(unfinished, directory / self.file)
                fsync(directory)
                self.is_finished = True

            self._open = BlockFile(unfinished, self.size, disk, finish)
            self._open.write(0, np.frombuffer(self._header, np.uint8))
        return self._open

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


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
