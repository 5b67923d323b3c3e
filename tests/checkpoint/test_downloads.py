"""What a download leaves that failed, or has not ended."""

import json
import shutil

import pytest

import fp8x
from fp8x.checkpoint import Reader
from fp8x.checkpoint.reader import CONFIG, INDEX, SINGLE
from fp8x.cli.loading import load_tokenizer
from fp8x.errors import CheckpointError
from fp8x.models.chat import apply_chat_template

# As `git clone` without LFS leaves it, and what huggingface.co answers without a login.
POINTER = f"""version https://git-lfs.github.com/spec/v1
oid sha256:{"4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"}
size 1983188
"""
PAGE = '\ufeff\n<!DOCTYPE html>\n<html class=""><head><title>Log in</title></head></html>' + 600 * " "
DENIED = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>'


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("name", [SINGLE, CONFIG, INDEX])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a Git LFS pointer, not the file that it stands for; run `git lfs pull` in .*hf download"),
        (PAGE, "is what a server answers, not the file: a download that failed.*hf download"),
        (DENIED, "is what a server answers"),
        ("Entry not found", "is what a server answers"),
    ],
    ids=["pointer", "page", "denied", "not found"],
)
def test_something_else_in_a_files_place(checkpoint, name, content, message):
    if name == INDEX:
        (checkpoint / SINGLE).unlink()
    (checkpoint / name).write_text(content, encoding="utf-8")
    for read in (Reader, fp8x.load):
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            read(checkpoint)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"])
def test_the_files_beside_the_weights(checkpoint, tmp_path, name):
    """What would be copied is looked at before anything is written."""
    model = fp8x.load(checkpoint)
    (checkpoint / name).write_text(POINTER)
    match = f"{name}: is a Git LFS pointer"
    with pytest.raises(CheckpointError, match=match):
        fp8x.convert(checkpoint, tmp_path / "b", "e4m3_bf16")
    with pytest.raises(CheckpointError, match=match):
        fp8x.save(model, tmp_path / "b")
    with pytest.raises(CheckpointError, match=match):
        if name == "tokenizer.json":
            load_tokenizer(checkpoint)
        else:
            apply_chat_template(checkpoint, [{"role": "user", "content": "hello"}])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_licence_may_be_a_page(checkpoint, tmp_path):
    (checkpoint / "LICENSE.html").write_text(PAGE, encoding="utf-8")
    fp8x.convert(checkpoint, tmp_path / "b", "e4m3_bf16")
    assert (tmp_path / "b" / "LICENSE.html").read_text(encoding="utf-8") == PAGE


@pytest.mark.parametrize(
    "part",
    [
        "model-00001-of-00002.safetensors.incomplete",
        "model-00001-of-00002.safetensors.part",
        ".cache/huggingface/download/model-00001-of-00002.safetensors.0a1b2c.incomplete",
        "../../blobs/0a1b2c.incomplete",
    ],
)
def test_downloads_that_have_not_ended(tiny_checkpoint, tmp_path, part):
    path = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    shutil.copytree(tiny_checkpoint, path)
    (path / SINGLE).unlink()
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    message = "'model-00001-of-00002.safetensors', which is missing"
    with pytest.raises(CheckpointError, match=rf"{message}$"):
        Reader(path)
    (path / part).parent.mkdir(parents=True, exist_ok=True)
    (path / part).touch()
    with pytest.raises(CheckpointError, match=rf"{message}; its download has not ended \(.*{part.split('/')[-1]}\)"):
        Reader(path)
    (path / INDEX).unlink()
    is_named = part.startswith("..")
    with pytest.raises(CheckpointError, match="found no weights" + ("; its download has not" if is_named else "$")):
        Reader(path)


def test_an_index_that_names_a_part(checkpoint):
    (checkpoint / SINGLE).rename(checkpoint / f"{SINGLE}.incomplete")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"a": f"{SINGLE}.incomplete"}}))
    with pytest.raises(CheckpointError, match=r"'a' lies in 'model.safetensors.incomplete', whose download has not"):
        Reader(checkpoint)
    (checkpoint / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"found no weights; its download has not ended \(.*\.incomplete\)"):
        Reader(checkpoint)
