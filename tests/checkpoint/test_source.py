"""What is named as a checkpoint and is none: everywhere that a path is taken."""

import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import fp8x
from fp8x.checkpoint import Reader
from fp8x.checkpoint.inspect import inspect
from fp8x.cli import app
from fp8x.errors import CheckpointError, Fp8xError

TAKERS = {
    "load": lambda path, out: fp8x.load(path),
    "plan": lambda path, out: fp8x.plan(path, "e4m3_bf16"),
    "convert": lambda path, out: fp8x.convert(path, out, "e4m3_bf16"),
    "choose_recipes": lambda path, out: fp8x.choose_recipes(path),
    "inspect": lambda path, out: inspect(path),
    "load_into": lambda path, out: fp8x.load_into(None, path),
}
COMMANDS = {
    "quantize": lambda path, out: ["quantize", path, out, "-r", "e4m3_bf16"],
    "inspect": lambda path, out: ["inspect", path],
    "reference": lambda path, out: ["inspect", "tiny", "--reference", path],
    "generate": lambda path, out: ["generate", path, "a"],
    "eval": lambda path, out: ["eval", path, "--data", "texts.jsonl"],
    "calibrate": lambda path, out: ["calibrate", path, "texts.jsonl", "-r", "e4m3_e4m3_bf16"],
}


def library_says(path, tmp_path) -> set[str]:
    said = set()
    for name, take in TAKERS.items():
        with pytest.raises(CheckpointError) as raised:
            take(path, tmp_path / "out")
        said.add(re.sub("fp8x.json", "config.json", str(raised.value)) if name == "load_into" else str(raised.value))
    return said


def commands_say(path) -> set[str]:
    said = set()
    for command in COMMANDS.values():
        run = CliRunner().invoke(app, command(str(path), "out"))
        assert run.exit_code == 2, run.stderr
        said.add(run.stderr.strip().removeprefix("error: "))
    return said


@pytest.fixture
def here(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_checkpoint)
    (tmp_path / "texts.jsonl").write_text('{"text": "a b c"}\n' * 20)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("meta-llama/Llama-3-8B", "meta-llama/Llama-3-8B"),
        ("https://huggingface.co/Qwen/Qwen3-8B/tree/main", "Qwen/Qwen3-8B"),
        ("hf://Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
    ],
)
def test_a_name_on_the_hub(here, name, hub_id):
    hint = f"`hf download {hub_id} --local-dir {hub_id.split('/')[1]}`"
    for said in library_says(name, here) | commands_say(name):
        assert "does not exist here" in said and hint in said


@pytest.mark.parametrize("name", ["models/mine", "a/b/c", "/a/b", "mine"])
def test_no_name_on_the_hub(here, name):
    (here / "models").mkdir()
    (said,) = library_says(name, here) | commands_say(name)
    assert said == f"{here / name}: does not exist; give a directory with config.json and model.safetensors"


def test_files_and_links(here, tiny_checkpoint):
    (here / "dangling").symlink_to("nowhere")
    (said,) = library_says("dangling", here) | commands_say("dangling")
    assert said == f"{here}/dangling: is a link to nowhere, which does not exist; give a directory"
    for file in ("model.safetensors", "config.json"):
        path = tiny_checkpoint / file
        (here / f"to-{file}").symlink_to(path)
        for said in library_says(path, here) | commands_say(path):
            assert said.startswith(f"{path}: is a file; give a directory with config.json and model.safetensors")
        assert f"like {tiny_checkpoint}, where it lies" in next(iter(commands_say(path)))
        (said,) = library_says(here / f"to-{file}", here)
        assert "is a file; give a directory" in said
    with pytest.raises(
        CheckpointError, match=r"out-link: is a link to .*config.json, which is a file; remove the link"
    ):
        (here / "out-link").symlink_to(tiny_checkpoint / "config.json")
        fp8x.convert(tiny_checkpoint, here / "out-link", "e4m3_bf16")
    with pytest.raises(CheckpointError, match=r"texts.jsonl: exists and is a file; it is left as it is"):
        fp8x.convert(tiny_checkpoint, here / "texts.jsonl", "e4m3_bf16")


def test_a_checkpoint_of_which_a_file_is_a_link_to_nothing(here, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, here / "copy")
    for file in ("model.safetensors", "config.json"):
        (here / "copy" / file).unlink()
        (here / "copy" / file).symlink_to("../blobs/gone")
        with pytest.raises(CheckpointError, match=rf"{file}: is a link to ../blobs/gone, which is missing"):
            Reader(here / "copy")


@pytest.fixture
def holed(tiny_checkpoint, here):
    """NaN in a matrix that becomes 8 bits, and in a norm that is copied."""
    shutil.copytree(tiny_checkpoint, here / "holed")
    tensors = load_file(here / "holed" / "model.safetensors")
    matrix = next(name for name in tensors if name.endswith("q_proj.weight"))
    norm = next(name for name in tensors if name.endswith("norm.weight"))
    for name in (matrix, norm):
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[3] = np.nan
    save_file(tensors, here / "holed" / "model.safetensors", {"format": "pt"})
    return matrix, norm


@pytest.mark.slow
def test_nonfinite_values_from_end_to_end(holed, here):
    matrix, norm = holed

    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*arguments])
        assert done.exit_code == code, done.stderr
        return done.stderr

    quantize = ["quantize", "holed", "out", "-r", "e4m3_bf16"]
    assert "holds 1 NaN or Inf of" in run(*quantize, code=2) and not (here / "out").exists()
    run(*quantize, "--verify", "--allow-nonfinite")
    assert (
        np.isnan(Reader("out").read(norm, shapes=[Reader("out").stored(norm).shape], dtypes=["BF16", "F32"])).sum() == 1
    )
    stored = Reader("out").stored(matrix)
    codes = Reader("out").read(matrix, shapes=[stored.shape], dtypes=["F8_E4M3"])
    assert np.isnan(codes.astype(np.float32)).sum() == 1
    assert "holds 1 NaN or Inf of" in run("quantize", "out", "back", "-r", "bf16", code=2)
    run("quantize", "out", "back", "-r", "bf16", "--allow-nonfinite")
    with pytest.raises(Fp8xError, match="holds 1 NaN or Inf"):
        fp8x.load("back")
    assert fp8x.load("out", "bf16", allow_nonfinite=True)
    data = ["--data", "texts.jsonl"]
    for command in (["generate", "out", "1 2", "-n", "4"], ["eval", "out", *data]):
        assert "holds 1 NaN or Inf" in run(*command, code=2)
        run(*command, "--allow-nonfinite")
