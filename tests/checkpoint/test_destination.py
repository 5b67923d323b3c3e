"""Where nothing is written: in the source, around it, and where the source would be cleared away."""

import os
import shutil

import pytest
from typer.testing import CliRunner

import fp8x
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
