"""What is taken over of a file that is not finished: after Ctrl-C, a kill, and a power cut."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fp8x.checkpoint import blocks
from fp8x.checkpoint.journal import Journal
from fp8x.checkpoint.resumable import ResumableWriter
from fp8x.errors import CheckpointError

SIZES = {"a": 5000, "b": 3, "none": 0, "c": 20_000, "d": 4096, "e": 9000, "f": 1}
SPECS = {name: ("U8", (size,)) for name, size in SIZES.items()}
BLOCK = 4096


def values(name: str) -> np.ndarray:
    return np.random.default_rng(ord(name[0])).integers(0, 256, SIZES[name]).astype(np.uint8)


def write(writer: ResumableWriter, names) -> list[str]:
    """What had to be written."""
    todo = [name for name in names if not writer.has(name)]
    for name in todo:
        data = values(name)
        for start in range(0, data.size, 1500):
            writer.write(name, start, data[start : start + 1500])
    return todo


def run(path) -> list[str]:
    with ResumableWriter(path, SPECS, "x") as writer:
        todo = write(writer, SPECS)
        writer.add_json("config.json", {})
    return todo


def interrupt(path, count: int) -> Path:
    with pytest.raises(KeyboardInterrupt), ResumableWriter(path, SPECS, "x") as writer:
        write(writer, list(SPECS)[:count])
        raise KeyboardInterrupt
    return path.with_name(f".{path.name}.partial")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    monkeypatch.setattr(blocks, "SYNC_SECONDS", 0)


@pytest.fixture
def expected(tmp_path) -> bytes:
    run(tmp_path / "whole")
    return (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("seconds", [0, 1000])
def test_an_interruption_at_every_tensor_of_one_file(tmp_path, expected, monkeypatch, seconds):
    monkeypatch.setattr(blocks, "SYNC_SECONDS", seconds)  # Ctrl-C notes what was written since
    names = list(SPECS)
    header = len(expected) - sum(SIZES.values())
    for count in range(len(names) + 1):
        out = tmp_path / f"out{count}"
        interrupt(out, count)
        # Those whose bytes lie in full blocks alone, and so on disk; the last block is full when it is all there.
        stored, end = header + sum(SIZES[name] for name in names[:count]), header
        full, lost = stored // BLOCK * BLOCK if count < len(names) else stored, []
        for name in names:
            end += SIZES[name]
            if end > full and not (SIZES[name] == 0 and end <= full + BLOCK):
                lost.append(name)
        todo = run(out)
        assert [name for name in todo if SIZES[name]] == [name for name in lost if SIZES[name]], count
        assert (out / "model.safetensors").read_bytes() == expected
        assert not list(tmp_path.glob(".*"))


# Writes to the file reach it at the next fsync; until then others lie there. So at every kill, before each of the calls
# to the system in turn, the disk holds what a power cut may leave.
POWER_CUTS = """
import json, os, signal, sys
from pathlib import Path
from test_journal import run
from fp8x.checkpoint import blocks

blocks.BLOCK, blocks.SYNC_SECONDS, blocks.O_DIRECT = 4096, 0, 0

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def cut_at(step, path):
    left, held, real_write, real_sync = [step], {}, os.pwrite, os.fsync
    def pwrite(descriptor, view, offset):
        held.setdefault(descriptor, []).append((bytes(view), offset))
        return real_write(descriptor, bytes(len(view)), offset)
    def fsync(descriptor):
        size = os.fstat(descriptor).st_size
        for data, offset in held.pop(descriptor, []):
            real_write(descriptor, data[: max(size - offset, 0)], offset)
        real_sync(descriptor)
    os.pwrite, os.fsync = pwrite, fsync
    for name in ("pwrite", "fsync", "rename", "unlink", "ftruncate", "open"):
        def counting(*arguments, call=getattr(os, name), **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        setattr(os, name, counting)
    run(path)

def again(path):
    try:
        todo = run(path)
    except ValueError:
        todo = None  # it was there
    (path.parent / "todo").write_text(json.dumps(todo))

base, ended = Path(sys.argv[1]), -1
for step in range(0, 1000, 2):
    path = base / str(step) / "out"
    path.parent.mkdir()
    ended = child(lambda: cut_at(step, path))
    if not ended:
        break
    child(lambda: again(path))
print(step)
"""


def test_power_cuts(tmp_path, expected):
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-c", POWER_CUTS, str(tmp_path / "runs")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    count = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert count > 50
    todo = []
    for step in range(0, count, 2):
        assert (tmp_path / "runs" / str(step) / "out" / "model.safetensors").read_bytes() == expected, step
        found = json.loads((tmp_path / "runs" / str(step) / "todo").read_text())
        todo.append(0 if found is None else len(found))
    assert todo[0] == len(SIZES) and {1, 2, 3, 4} & set(todo), "some runs went on in the middle"


def test_half_a_line_says_nothing(tmp_path, expected):
    left = interrupt(tmp_path / "out", 5)
    journal = left / "journal" / "model.safetensors"
    lines, whole = journal.read_bytes(), set()
    assert len(lines.splitlines()) > 3
    for length in range(len(lines)):
        journal.write_bytes(lines[:length])
        found = Journal(journal, left / "out" / "model.safetensors.tmp", BLOCK, len(expected)).blocks
        whole |= found
        complete = [json.loads(line) for line in lines[:length].splitlines()[1:] if line.endswith(b"]")]
        assert found == {index for line in complete for index in line}
    journal.write_bytes(lines[:-3])
    assert len(run(tmp_path / "out")) < len(SPECS)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("change", ["another file", "shorter", "no file", "no JSON", "other blocks"])
def test_a_journal_of_something_else_is_not_used(tmp_path, expected, monkeypatch, change):
    left = interrupt(tmp_path / "out", 5)
    file, journal = left / "out" / "model.safetensors.tmp", left / "journal" / "model.safetensors"
    match change:
        case "another file":
            (file.parent / "other").write_bytes(bytes(file.stat().st_size))
            os.rename(file.parent / "other", file)
        case "shorter":
            os.truncate(file, 100)
        case "no file":
            file.unlink()
        case "no JSON":
            journal.write_bytes(bytes(100))
        case "other blocks":
            monkeypatch.setattr(blocks, "BLOCK", 2 * BLOCK)
    assert run(tmp_path / "out") == list(SPECS)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_an_error_leaves_no_journal(tmp_path):
    interrupt(tmp_path / "out", 5)
    with pytest.raises(CheckpointError, match="mine"), ResumableWriter(tmp_path / "out", SPECS, "x"):
        raise CheckpointError("mine")
    assert not list(tmp_path.iterdir())


def test_directories_that_lie_there_are_no_obstacle(tmp_path):
    """As of a run that was killed when it had copied them."""
    left = interrupt(tmp_path / "out", 5)
    (left / "out" / "2_Dense").mkdir()
    (left / "out" / "2_Dense" / "config.json").touch()
    run(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_what_is_taken_over_needs_no_room_again(tmp_path, monkeypatch):
    interrupt(tmp_path / "out", 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert len(run(tmp_path / "out")) < len(SPECS)
    with pytest.raises(CheckpointError, match="but 1,000 are free on its disk"):
        run(tmp_path / "other")


CONVERT = """
import os, signal, sys, fp8x
from fp8x.checkpoint import blocks

blocks.BLOCK, blocks.SYNC_SECONDS = 4096, 0

def progress(done, total):
    if done / total >= float(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

fp8x.convert(sys.argv[1], sys.argv[2], "mxfp8_bf16", progress=progress)
"""


@pytest.mark.parametrize("share", [0.7, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.2, 0.4, 0.9, 1.0))])
def test_a_killed_conversion_of_one_file(tiny_checkpoint, tmp_path, share):
    import fp8x

    fp8x.convert(tiny_checkpoint, tmp_path / "whole", "mxfp8_bf16")
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", CONVERT, str(tiny_checkpoint), str(out), str(share)]
    killed = subprocess.run(arguments, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = fp8x.convert(tiny_checkpoint, out, "mxfp8_bf16")
    assert 0 < done.bytes_resumed <= done.bytes_written
    for file in (tmp_path / "whole").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
