"""Where nothing is written: in the source, around it, and where the source would be cleared away."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fp8x
from fp8x.checkpoint import Reader, Writer
from fp8x.checkpoint.destination import check_source, leftovers
from fp8x.cli import app
from fp8x.errors import CheckpointError


@pytest.fixture
def source(tiny_checkpoint, tmp_path):
    """In `models`, to which there is a link, and a link to it in `other`."""
    shutil.copytree(tiny_checkpoint, tmp_path / "models" / "a")
    (tmp_path / "link").symlink_to("models")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b").symlink_to(tmp_path / "models" / "a")
    return tmp_path / "models" / "a"


def everything(path) -> list[str]:
    return sorted(str(found) for found in path.rglob("*"))


PLACES = [
    ("models/a", "is the source"),
    ("models/a/fp8", "lies in the source"),
    ("models/a/x/y/fp8", "lies in the source"),
    ("models", "holds the source"),
    ("link/a", "is the source"),
    ("link/a/fp8", "lies in the source"),
    ("other/b/fp8", "lies in the source"),
    ("other/../models/a/fp8", "lies in the source"),
    ("link", "holds the source"),
]


@pytest.mark.parametrize(("place", "message"), PLACES)
def test_the_source_is_out_of_the_way(source, tmp_path, place, message):
    before, model = everything(tmp_path), fp8x.load(source)
    with pytest.raises(CheckpointError, match=f"{message}, {source}, which would be changed; write elsewhere"):
        fp8x.convert(source, tmp_path / place, "e4m3_bf16")
    with pytest.raises(CheckpointError, match=message):
        fp8x.save(model, tmp_path / place)
    run = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / place), "-r", "e4m3_bf16"])
    assert run.exit_code == 2 and message in run.stderr
    assert everything(tmp_path) == before


def test_the_source_may_be_named_by_a_link(source, tmp_path):
    with pytest.raises(CheckpointError, match="lies in the source"):
        fp8x.convert(tmp_path / "other" / "b", source / "fp8", "e4m3_bf16")
    fp8x.convert(tmp_path / "other" / "b", tmp_path / "other" / "fp8", "e4m3_bf16")
    fp8x.convert(source, tmp_path / "models" / "a-fp8", "e4m3_bf16")  # beside it, by a longer name


def test_what_load_found_may_be_gone_when_save_writes(source, tmp_path):
    model = fp8x.load(source)
    shutil.rmtree(source)
    fp8x.save(model, source / "fp8")
    assert fp8x.load(source / "fp8")


@pytest.mark.parametrize("left", [".out.partial", ".out.tmp-0123abcd"])
def test_a_source_that_would_be_cleared_away(source, tmp_path, left):
    os.rename(source.parent, tmp_path / left)
    model = fp8x.load(tmp_path / left / "a")
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match=rf"a: lies in .*{left}, which is cleared; move it"):
        fp8x.convert(tmp_path / left / "a", tmp_path / "out", "e4m3_bf16")
    with pytest.raises(CheckpointError, match="which is cleared"):
        fp8x.save(model, tmp_path / "out")
    assert everything(tmp_path) == before


def test_only_names_of_our_own_are_leftovers(tmp_path):
    ours = {".out.partial", ".out.tmp-0123abcd"}
    for name in {*ours, ".out.tmp-0123abcde", ".out.tmp-0123abcX", ".out2.partial", "out.partial", ".out.partial2"}:
        (tmp_path / name).mkdir()
    assert {path.name for path in leftovers(tmp_path / "out")} == ours
    assert leftovers(tmp_path / "nowhere" / "out") == []
    check_source(tmp_path / "nowhere", tmp_path / "out")


def save(path) -> None:
    with Writer(path) as writer:
        writer.add("a", np.zeros(4, np.float32))
        writer.add_json("config.json", {})


def convert(source, path) -> None:
    fp8x.convert(source, path, "e4m3_bf16")


def test_the_working_directory(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    number = os.stat(".").st_ino
    run = CliRunner().invoke(app, ["quantize", str(tiny_checkpoint), ".", "-r", "e4m3_bf16", "--verify"])
    assert run.exit_code == 0, run.stderr
    assert os.stat(".").st_ino == os.stat(tmp_path / "out").st_ino == number
    assert "config.json" in os.listdir(".") and not [name for name in os.listdir(".") if name.startswith(".")]
    assert os.listdir(tmp_path) == ["out"]
    assert set(Reader(".")) == set(Reader(tmp_path / "out"))


@pytest.mark.parametrize("name", ["out", "out/", "out//.", "link", "link/", "../{here}/out"])
@pytest.mark.parametrize("is_save", [False, True])
def test_an_empty_directory_is_filled_by_whatever_name(tiny_checkpoint, tmp_path, monkeypatch, name, is_save):
    (tmp_path / "out").mkdir(0o750)
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path)
    before = os.stat("out")
    name = name.format(here=tmp_path.name)
    save(name) if is_save else convert(tiny_checkpoint, name)
    after = os.stat("out")
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert sorted(os.listdir()) == ["link", "out"] and os.path.islink("link")
    assert Reader(name).config is not None and not list(Path("out").glob(".*"))


@pytest.mark.parametrize("is_save", [False, True])
def test_a_mount_point(tiny_checkpoint, tmp_path, monkeypatch, is_save):
    """No name goes from one file system to another, and a new disk holds a directory of its own."""
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)

    def rename(source, target, rename=os.rename):
        if Path(source) == out or (out in Path(source).parents) != (out in Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    save(out) if is_save else convert(tiny_checkpoint, out)
    assert os.listdir(tmp_path) == ["out"] and Reader(out)
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    with pytest.raises(CheckpointError, match="out: exists and is not empty"):
        save(out)


MOUNT = "mount -t tmpfs none {0}/saved && mount -t tmpfs none {0}/converted && {1} -c '{2}' {0} && ls -A {0}/*"
WRITE = """
import sys, numpy as np
from fp8x.checkpoint import Writer
from fp8x.checkpoint.resumable import ResumableWriter

with Writer(sys.argv[1] + "/saved") as writer:
    writer.add("a", np.zeros(4, np.uint8))
with ResumableWriter(sys.argv[1] + "/converted", {"a": ("U8", (4,))}, "x") as writer:
    writer.write("a", 0, np.zeros(4, np.uint8))
"""


def test_a_real_mount_point(tmp_path):
    for name in ("saved", "converted"):
        (tmp_path / name).mkdir()
    alone = ["unshare", "-rm"]
    if subprocess.run([*alone, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("nobody may mount here")
    command = MOUNT.format(tmp_path, sys.executable, WRITE)
    run = subprocess.run([*alone, "sh", "-c", command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("model.safetensors") == 2 and "." not in {line[:1] for line in run.stdout.splitlines()}


def test_what_fails_while_a_directory_is_filled_leaves_it_empty(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()

    def rename(source, target, rename=os.rename):
        if Path(target).name == "config.json":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointError, match=r"out: can't be written: .*Input/output error; nothing is left of it"):
        save(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [] and os.listdir(tmp_path) == ["out"]


def test_a_link_to_nothing(tiny_checkpoint, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for write in (save, lambda path: convert(tiny_checkpoint, path)):
        with pytest.raises(
            CheckpointError, match=f"link: is a link to {tmp_path / 'nowhere'}, which is not there; remove"
        ):
            write(tmp_path / "link")
    run = CliRunner().invoke(app, ["quantize", str(tiny_checkpoint), str(tmp_path / "link"), "-r", "e4m3_bf16"])
    assert run.exit_code == 2 and "link: is a link to" in run.stderr
    assert os.listdir(tmp_path) == ["link"]


def test_a_working_directory_that_is_gone(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(CheckpointError, match="out: the working directory is gone; change to one that is there"):
        save("out")
    run = CliRunner().invoke(app, ["quantize", str(tiny_checkpoint), "out", "-r", "e4m3_bf16"])
    assert run.exit_code == 2 and "the working directory is gone" in run.stderr
