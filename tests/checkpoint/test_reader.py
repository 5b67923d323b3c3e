"""Reading: what a Reader gives, and what it says of a broken directory."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fp8x.checkpoint import Reader
from fp8x.checkpoint.reader import DTYPES, INDEX, SINGLE
from fp8x.errors import CheckpointError


def tensor(dtype: str = "F32", shape: tuple[int, ...] = (2, 3)) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape).astype(DTYPES[dtype])


@pytest.fixture
def single(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    save_file({dtype: tensor(dtype) for dtype in DTYPES} | {"scalar": tensor(shape=())}, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for name, file in weight_map.items():
        save_file({name: tensor()}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def fails(path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        Reader(path)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_comes_back_byte_by_byte(single, dtype):
    array = Reader(single).read(dtype, shapes=[(2, 3)], dtypes=[dtype])
    assert array.dtype == DTYPES[dtype] and array.tobytes() == tensor(dtype).tobytes()
    assert not array.flags.writeable


def test_scalars_and_empty_tensors(single):
    save_file({"scalar": tensor(shape=()), "empty": np.zeros((0, 4), np.float32)}, single / SINGLE)
    reader = Reader(single)
    assert reader.read("scalar", shapes=[(1,), ()], dtypes=["F32"]).shape == ()
    assert reader.read("empty", shapes=[(0, 4)], dtypes=["F32"]).size == 0


def test_index(sharded):
    reader = Reader(sharded)
    assert sorted(reader) == ["a", "b"] and "c" not in reader
    assert reader.stored("b").file.name == "model-2.safetensors"


def resident(file: Path) -> int:
    """Bytes of a mapped file in this process's memory."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    (mapping,) = [m for m in mappings if str(file) in m]
    return 1024 * int(re.search(r"Rss:\s+(\d+)", mapping)[1])


def test_released_pages_leave_memory_and_can_be_read_again(single):
    values = np.arange(4 * 2**20, dtype=np.float32)
    save_file({"a": values, "b": values[:10]}, single / SINGLE)
    reader = Reader(single)
    reader.release("a")  # nothing is mapped yet
    array = reader.read("a", shapes=[values.shape], dtypes=["F32"])
    total = array.sum()
    assert resident(single / SINGLE) > 16 * 2**20
    reader.release("a", 0, 8 * 2**20)
    assert 5 * 2**20 < resident(single / SINGLE) <= 9 * 2**20  # the system may unmap a huge page as a whole
    reader.release("a")
    assert resident(single / SINGLE) < 2**17
    assert array.sum() == total


def test_unexpected_tensor(single):
    reader = Reader(single)
    with pytest.raises(
        CheckpointError, match=r"F32 in .*model.safetensors: shape is \[2, 3\], expected \[3, 2\] or \[6\]"
    ):
        reader.read("F32", shapes=[(3, 2), (6,)], dtypes=["F32"])
    with pytest.raises(CheckpointError, match=r"U8 in .*model.safetensors: dtype is U8, expected F32 or BF16"):
        reader.read("U8", shapes=[(2, 3)], dtypes=["F32", "BF16"])
    with pytest.raises(CheckpointError, match="nothing: missing from"):
        reader.read("nothing", shapes=[()], dtypes=["F32"])


def test_no_directory(single):
    fails(single / "nowhere", "nowhere: does not exist", "config.json")
    fails(single / SINGLE, "is a file; give a directory")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a JSON list, expected an object"),
        ("\ud800", "is not JSON"),
        ("[" * 99999, "is not JSON"),
    ],
)
def test_broken_config(single, text, message):
    (single / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    fails(single, "config.json", message)
    (single / "config.json").unlink()
    fails(single, "config.json: missing")


def test_no_weights(single):
    (single / SINGLE).rename(single / "pytorch_model.bin")
    fails(single, "has neither model.safetensors nor model.safetensors.index.json", "found pytorch_model.bin")
    (single / "pytorch_model.bin").unlink()
    fails(single, "found no weights")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated(single, keep):
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:keep])
    fails(single, "model.safetensors: is truncated or not a safetensors file")


def test_corrupt(single):
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(b"<html>" + content)
    fails(single, "not a safetensors file")
    header = b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,4]}}'
    (single / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    fails(single, "not a safetensors file")


def test_broken_index(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]

    def index(**changes) -> None:
        (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map | changes}))

    index(c="model-2.safetensors")
    fails(sharded, "says that model-2.safetensors holds c, but it does not")
    index(b="model-1.safetensors")
    fails(sharded, "says that model-1.safetensors holds b, but it does not")
    index(a="model-9.safetensors")
    fails(sharded, "a lies in model-9.safetensors, which is missing")
    index(a="../model-1.safetensors")
    fails(sharded, "which is not a file name")
    save_file({"a": tensor(), "b": tensor()}, sharded / "model-2.safetensors")
    index()
    fails(sharded, "a: is in both model-1.safetensors and model-2.safetensors")
    (sharded / INDEX).write_text('{"weights": 1}')
    fails(sharded, "has no weight_map")
