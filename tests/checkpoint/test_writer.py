"""Writing: all or nothing, and nothing of others' destroyed."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fp8x.checkpoint import Reader, Writer
from fp8x.checkpoint.reader import INDEX
from fp8x.errors import CheckpointError


def write(path: Path, tensors: int = 3, **options) -> None:
    with Writer(path, **options) as writer:
        writer.add_json("config.json", {"a": 1})
        for i in range(tensors):
            writer.add(f"t{i}", np.full((4, 4), i, np.float32))


def listing(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_single_file(tmp_path):
    write(tmp_path / "new" / "out")
    assert listing(tmp_path / "new") == ["out"]
    assert listing(tmp_path / "new" / "out") == ["config.json", "model.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new" / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "new" / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_shards(tmp_path):
    write(tmp_path / "out", max_shard_bytes=128)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert listing(tmp_path / "out") == ["config.json", *names, INDEX]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index == {"metadata": {"total_size": 192}, "weight_map": {"t0": names[0], "t1": names[0], "t2": names[1]}}
    reader = Reader(tmp_path / "out")
    assert all((reader.read(f"t{i}", shapes=[(4, 4)], dtypes=["F32"]) == i).all() for i in range(3))


def test_tensor_larger_than_a_shard(tmp_path):
    write(tmp_path / "out", max_shard_bytes=1)
    assert len(listing(tmp_path / "out")) == 5 and len(list(Reader(tmp_path / "out"))) == 3


def test_progress(tmp_path):
    written = []
    write(tmp_path / "out", max_shard_bytes=128, progress=written.append)
    assert written == [64, 128, 192]


def test_tensors_are_aligned_and_in_the_format_of_the_library(tmp_path):
    tensors = {"a": np.ones(3, np.uint8), "b": np.ones((2, 2), np.float32), "é": np.ones((), np.float16)}
    with Writer(tmp_path / "out") as writer:
        writer.add_json("config.json", {})
        for name, array in tensors.items():
            writer.add(name, array)
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert read.keys() == tensors.keys() and all(np.array_equal(read[name], tensors[name]) for name in tensors)
    reader = Reader(tmp_path / "out")
    assert all(reader.stored(name).start % tensors[name].itemsize == 0 for name in tensors)


def test_strided_and_scalar_tensors(tmp_path):
    with Writer(tmp_path / "out") as writer:
        writer.add_json("config.json", {})
        writer.add("strided", np.arange(6, dtype=np.float32).reshape(2, 3).T)
        writer.add("scalar", np.float32(3))
    reader = Reader(tmp_path / "out")
    assert reader.read("strided", shapes=[(3, 2)], dtypes=["F32"]).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert reader.read("scalar", shapes=[()], dtypes=["F32"]) == 3


def test_existing_destination_is_untouched(tmp_path):
    write(tmp_path / "out", 1)
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(CheckpointError, match="out: exists and is not empty; it is left as it is"):
        write(tmp_path / "out", 2)
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before and listing(tmp_path) == ["out"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is a file"):
        write(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"inside: can't be written: .*File exists"):
        write(tmp_path / "file" / "inside")
    assert (tmp_path / "file").read_text() == "mine"


def test_empty_directories_and_links_to_them_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write(tmp_path / "link")
    assert "config.json" in listing(tmp_path / "empty") and (tmp_path / "link").is_symlink()


def test_destination_that_appears_meanwhile_is_untouched(tmp_path):
    with pytest.raises(CheckpointError, match="exists and is not empty"), Writer(tmp_path / "out") as writer:
        writer.add("t", np.zeros(1, np.float32))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("theirs")
    assert listing(tmp_path) == ["out"] and listing(tmp_path / "out") == ["other"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_in_the_middle_leaves_nothing(tmp_path, error):
    with pytest.raises(error), Writer(tmp_path / "out", max_shard_bytes=1) as writer:
        writer.add("a", np.zeros(4, np.float32))
        writer.add("b", np.zeros(4, np.float32))
        raise error
    assert listing(tmp_path) == []


KILLED = """
import sys, time, numpy as np
from fp8x.checkpoint import Writer

with Writer(sys.argv[1], max_shard_bytes=1) as writer:
    writer.add("a", np.zeros(4, np.float32))
    writer.add("b", np.zeros(4, np.float32))
    print(flush=True)
    time.sleep(600)
"""


def test_what_a_killed_writer_left_is_swept(tmp_path):
    other = tmp_path / ".out.tmp-not-ours"
    other.mkdir()
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "out"], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            (left,) = [path for path in tmp_path.iterdir() if path != other]
            assert listing(left) == ["shard-00001.safetensors"]
            with Writer(tmp_path / "out"):
                assert left.exists(), "its writer lives"
        finally:
            process.kill()
    assert left.exists()
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=rf"removed what a run that was killed had left: {left} \([\d,]+ bytes\)"):
        write(tmp_path / "out")
    assert listing(tmp_path) == [".out.tmp-not-ours", "out"]


def test_of_two_writers_the_first_to_finish_wins(tmp_path):
    with pytest.raises(CheckpointError, match="out: exists and is not empty"), Writer(tmp_path / "out") as slow:
        slow.add("slow", np.zeros(1, np.float32))
        with Writer(tmp_path / "out") as fast:
            fast.add("fast", np.zeros(1, np.float32))
            fast.add_json("config.json", {})
        slow.add_json("config.json", {})
    assert listing(tmp_path) == ["out"] and list(Reader(tmp_path / "out")) == ["fast"]


def test_writers_that_rename_at_once(tmp_path, monkeypatch):
    """The other comes between the last look and the renaming."""

    def rename(source, target, rename=os.rename):
        if source.is_dir():
            target.mkdir()
            (target / "other").write_text("theirs")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointError, match="out: exists and is not empty; it is left as it is"):
        write(tmp_path / "out")
    assert listing(tmp_path) == ["out"] and listing(tmp_path / "out") == ["other"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    left = tmp_path / ".out.tmp-01234567"
    left.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", unsupported)
        with pytest.warns(UserWarning, match=rf"no locks, so what another run has left stays: {left} \(0 bytes\)"):
            write(tmp_path / "out")
    assert listing(tmp_path) == [left.name, "out"], "nobody knows whether its writer lives"
    (tmp_path / "empty").mkdir()
    shutil.rmtree(tmp_path / "out")
    write(tmp_path / "out")
    assert listing(tmp_path) == ["empty", "out"]


@pytest.mark.parametrize("max_shard_bytes", [10_000, 10**9])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, max_shard_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "out").mkdir()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # Python ignores the signal that comes with it
        with (
            pytest.raises(CheckpointError, match=r"out: can't be written: .*File too large; nothing is left of it"),
            Writer(tmp_path / "out", max_shard_bytes=max_shard_bytes) as writer,
        ):
            writer.add("a", np.zeros(2000, np.float32))
            writer.add("b", np.zeros(2000, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(tmp_path) == ["out"] and listing(tmp_path / "out") == []


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, function):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(
        CheckpointError, match=r"out: can't be written: .*No space left on device; nothing is left of it"
    ):
        write(tmp_path / "out")
    assert listing(tmp_path) == []


def test_companions(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors", "README.md", "LICENSE"):
        (source / name).write_text(name)
    with Writer(tmp_path / "out") as writer:
        writer.copy_companions(source)
        writer.copy_companions(tmp_path / "gone")
    assert listing(tmp_path / "out") == [
        "LICENSE",
        "README.md",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"


def test_arguments(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="max_shard_bytes: 0 does not fit"):
        Writer(tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(CheckpointError, match="a: added twice"), Writer(tmp_path / "out") as writer:
        writer.add("a", np.zeros(1))
        writer.add("a", np.zeros(1))
    with pytest.raises(CheckpointError, match="a: dtype is complex64; use one of float32"), Writer(out) as writer:
        writer.add("a", np.zeros(1, np.complex64))
