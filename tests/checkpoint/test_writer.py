"""Writing: all or nothing, and nothing of others' destroyed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

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
    assert listing(tmp_path / "out") == ["LICENSE", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"


def test_arguments(tmp_path):
    with pytest.raises(CheckpointError, match="max_shard_bytes: 0 does not fit"):
        Writer(tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(CheckpointError, match="a: added twice"), Writer(tmp_path / "out") as writer:
        writer.add("a", np.zeros(1))
        writer.add("a", np.zeros(1))
