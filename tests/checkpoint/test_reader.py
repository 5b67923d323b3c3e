"""Reading: what a Reader gives, and what it says of a broken directory."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
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


def test_scalars_and_empty_tensors(single):
    save_file({"scalar": tensor(shape=()), "empty": np.zeros((0, 4), np.float32)}, single / SINGLE)
    reader = Reader(single)
    assert reader.read("scalar", shapes=[(1,), ()], dtypes=["F32"]).shape == ()
    assert reader.read("empty", shapes=[(0, 4)], dtypes=["F32"]).size == 0


def test_index(sharded):
    reader = Reader(sharded)
    assert sorted(reader) == ["a", "b"] and "c" not in reader
    assert reader.stored("b").file.name == "model-2.safetensors"


SLICES = [
    (slice(None), slice(None)),
    (slice(2, 5), slice(None)),
    (slice(None), slice(1, 3)),
    (slice(3, 7), slice(0, 2)),
    (slice(6, None), slice(-1, None)),
    (slice(3, 3), slice(None)),
    (slice(None), slice(2, 2)),
    (slice(1, 4),),
]


@pytest.mark.parametrize("piece", [1, 12, 10**6])
def test_slices_are_those_of_the_array(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("fp8x.checkpoint.views.PIECE", piece)
    tensors = {"m": tensor(shape=(7, 3)), "s": tensor(shape=()), "v": tensor(shape=(7,)), "c": tensor(shape=(7, 3, 2))}
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    reader = Reader(tmp_path)
    found = {name: reader.slices(name, shapes=[array.shape], dtypes=["F32"]) for name, array in tensors.items()}
    for index in SLICES:
        for name in "mc":
            part = found[name][index]
            assert (
                np.array_equal(part, tensors[name][index]) and part.flags.c_contiguous and part.flags.owndata is False
            )
        assert np.array_equal(found["v"][index[:1]], tensors["v"][index[:1]])
    assert found["s"][()] == tensors["s"] and found["s"][...].shape == ()
    assert all(np.array_equal(found[name][...], array) for name, array in tensors.items())
    assert (found["m"].shape, found["m"].dtype) == ((7, 3), np.float32)


def test_arrays_are_of_their_own_and_aligned(single):
    """So JAX takes them over on CPU as they are, and nobody sees what others write."""
    reader = Reader(single)
    for dtype in DTYPES:
        first, second = (reader.read(dtype, shapes=[(2, 3)], dtypes=[dtype]) for _ in range(2))
        assert first.ctypes.data % 64 == 0
        first.view(np.uint8)[...] = 77
        assert second.tobytes() == tensor(dtype).tobytes()


def test_files_are_closed_with_the_reader(single):
    def opened() -> int:
        return sum(
            os.path.realpath(f"/proc/self/fd/{number}") == str(single / SINGLE)
            for number in os.listdir("/proc/self/fd")
        )

    reader = Reader(single)
    slices = reader.slices("F32", shapes=[(2, 3)], dtypes=["F32"])
    slices[...]
    assert opened() == 1
    reader.close()
    assert opened() == 0
    assert slices[...].sum() == 15 and opened() == 1
    del reader, slices
    assert opened() == 0


TRUNCATED = """
import os, sys
from pathlib import Path
import fp8x
from fp8x.checkpoint import Reader
from fp8x.checkpoint.inspect import inspect
from fp8x.errors import CheckpointError

source, copy = Path(sys.argv[1]), Path(sys.argv[2])
file = copy / "model.safetensors"
content = (source / "model.safetensors").read_bytes()

def refused(work, *arguments, **options):
    try:
        work(*arguments, **options)
    except CheckpointError as error:
        print(work.__name__, error)
    else:
        print(work.__name__, "is through")
    file.write_bytes(content)

def truncate(*_):
    os.truncate(file, len(content) // 2)

reader = Reader(copy)
names = sorted(reader, key=lambda name: reader.stored(name).start)
def read(name):
    reader.read(name, shapes=[reader.stored(name).shape], dtypes=[reader.stored(name).dtype])
read(names[0])
truncate()
refused(read, names[-1])
refused(fp8x.load, copy, progress=truncate)
refused(fp8x.load, copy, "e4m3_bf16", progress=truncate)
refused(fp8x.convert, copy, copy.parent / "out", "e4m3_bf16", progress=truncate)
refused(inspect, copy, progress=truncate)
refused(inspect, copy, recipe="e4m3_bf16", progress=truncate)
"""


def test_a_file_that_is_truncated_in_use_is_an_error_and_no_signal(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "a")
    command = [sys.executable, "-c", TRUNCATED, str(tiny_checkpoint), str(tmp_path / "a")]
    run = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["read", "load", "load", "convert", "inspect", "inspect"]
    assert all(
        "model.safetensors: has changed since" in line or "has changed since it was" in line for line in lines
    ), lines
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_reader_that_outlives_all_else_ends_without_a_word(single):
    """As one that a traceback holds while the interpreter ends, and empties modules."""
    code = "import codecs, sys; from fp8x.checkpoint import Reader; r = codecs.kept = Reader(sys.argv[1]); "
    code += "s = r.stored('F32'); r.read('F32', shapes=[s.shape], dtypes=[s.dtype])"
    run = subprocess.run([sys.executable, "-c", code, str(single)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


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
        ("{", "config.json is not JSON"),
        ("[1]", "config.json is a JSON list, expected an object"),
        ("\ud800", "config.json is not JSON: 'utf-8' codec"),
        ("[" * 99999, "config.json is not JSON: maximum recursion"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "config.json is not JSON: 'c' comes twice in one object"),
        ('{"a": ' + "1" * 5000 + "}", "config.json is not JSON: Exceeds the limit"),
    ],
)
def test_broken_config(single, text, message):
    (single / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    fails(single, message)
    (single / "config.json").unlink()
    fails(single, "config.json: is missing; a Hugging Face directory has config.json beside")


def test_no_weights(single):
    (single / SINGLE).rename(single / "pytorch_model.bin")
    fails(single, "has neither model.safetensors nor model.safetensors.index.json", "found pytorch_model.bin")
    (single / "pytorch_model.bin").unlink()
    fails(single, "found no weights")
    (single / SINGLE).mkdir()
    fails(single, "model.safetensors: is a directory")


def test_links(single, tmp_path_factory):
    """As the cache of huggingface_hub has them: files are links to blobs."""
    cache = tmp_path_factory.mktemp("cache")
    for name in ("config.json", SINGLE):
        (cache / name).symlink_to(single / name)
    assert Reader(cache).read("F32", shapes=[(2, 3)], dtypes=["F32"]).sum() == 15
    (single / SINGLE).unlink()
    fails(cache, f"model.safetensors: is a link to {single / SINGLE}, which is missing")


def test_unreadable(single, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    fails(single, "config.json: can't be read: Permission denied")


@pytest.mark.parametrize("keep", [0, 4, 8, 100])
def test_truncated(single, keep):
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:keep])
    fails(single, f"model.safetensors: is truncated or not a safetensors file: has {keep} bytes")


def test_wrong_length(single):
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:-1])
    fails(single, f"model.safetensors: is truncated: it has {len(content) - 1:,} bytes, its header describes")
    (single / SINGLE).write_bytes(content + b"\0")
    fails(single, "model.safetensors: has bytes that no tensor holds")
    (single / SINGLE).write_bytes(b"PK\3\4\n\0" + content)
    fails(single, "not a safetensors file", "begins with a header of")


def test_a_header_of_absurd_length_is_not_read(single):
    with (single / SINGLE).open("wb") as f:
        f.write(struct.pack("<Q", 10**11))
        f.truncate(2 * 10**11)  # takes no room on the disk
    fails(single, "a header of 100,000,000,000 bytes is over 100,000,000")


def write(path: Path, header: bytes | dict, size: int = 8) -> None:
    header = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"\xff": 1}', "the header is not JSON: 'utf-8' codec"),
        (b"[]", "the header is a JSON list"),
        (b'{"a":{"dtype":"F32","dtype":"F32"}}', "the header is not JSON: 'dtype' comes twice"),
        (b'{"a":[],"a":[]}', "the header is not JSON: 'a' comes twice in one object"),
        ({"\ud800": entry()}, r"'\ud800' in {file}: the name is no Unicode"),
        ({"a": 3}, "'a' in {file}: the header has 3, expected dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, "expected dtype, shape and data_offsets"),
        ({"a": entry(dtype="F99")}, "'a' in {file}: dtype 'F99' is unknown; safetensors has F32, F16"),
        ({"a": entry(dtype=["F32"])}, "dtype ['F32'] is unknown"),
        ({"a": entry(shape=[-2])}, "'a' in {file}: shape [-2] is no list"),
        ({"a": entry(shape=[2.0])}, "shape [2.0] is no list"),
        ({"a": entry(shape=[True, 2])}, "shape [True, 2] is no list"),
        ({"a": entry(shape=2)}, "shape 2 is no list"),
        ({"a": entry(shape=[1] * 64 + [2])}, "is no list of at most 64 sizes"),
        ({"a": entry(shape=[2**62, 4, 2])}, "is larger than an array can be"),
        ({"a": entry(shape=[2**62, 0], offsets=[0, 0])}, "is larger than an array can be"),
        ({"a": entry(shape=[3])}, "'a' in {file}: F32 of shape [3] does not fit into bytes 0 to 8"),
        ({"a": entry(offsets=[8, 0])}, "does not fit into bytes 8 to 0"),
        ({"a": entry(offsets=[-8, 0])}, "data_offsets [-8, 0] are no list of a begin and an end"),
        ({"a": entry(offsets=[0, 8, 16])}, "data_offsets [0, 8, 16] are no list"),
        ({"a": entry(offsets=[0, None])}, "data_offsets [0, None] are no list"),
        ({"a": entry(offsets=[8, 16])}, "a in {file}: begins 8 bytes late; the file is damaged"),
        ({"a": entry(), "b": entry()}, "b in {file}: overlaps the one before it"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "b in {file}: overlaps the one before it"),
        ({"a": entry(), "b": entry(offsets=[8, 16])}, "{file}: is truncated: it has"),
        ({}, "{file}: has bytes that no tensor holds"),
    ],
)
def test_broken_headers(single, header, message):
    write(single / SINGLE, header)
    fails(single, message.replace("{file}", str(single / SINGLE)))


def test_unusual_headers(single):
    """Tensors in any order, of no bytes, at odd addresses, of types that numpy lacks."""
    header = {
        "b": entry("BF16", [2], [3, 7]),
        "a": entry("U8", [3], [0, 3]),
        "none": entry("F32", [0, 5], [3, 3]),
        "half": entry("F4", [2], [7, 8]),
        "__metadata__": {"format": "pt"},
    }
    write(single / SINGLE, header | {"odd": entry("U8", [0], [8, 8])})
    reader = Reader(single)
    array = reader.read("b", shapes=[(2,)], dtypes=["BF16"])
    assert array.tolist() == [0, 0] and jnp.asarray(array).tolist() == [0, 0]
    assert reader.read("none", shapes=[(0, 5)], dtypes=["F32"]).size == 0
    assert reader.stored("half").nbytes == 1


def test_more_experts_than_there_can_be(single):
    write(single / SINGLE, {"model.layers.0.mlp.experts.down_proj": entry(shape=[10**9, 0, 4], offsets=[0, 0])}, size=0)
    fails(single, "model.layers.0.mlp.experts.down_proj in", "1000000000 experts are over 65536")


@pytest.mark.parametrize("change", ["truncate", "touch", "replace", "remove"])
def test_file_that_changes_after_opening(single, change):
    reader, file = Reader(single), single / SINGLE
    reader.read("F32", shapes=[(2, 3)], dtypes=["F32"])
    match change:
        case "truncate":
            os.truncate(file, 10)
        case "touch":
            os.utime(file, (1, 1))
        case "replace":
            save_file({"F32": tensor(shape=(3, 3))}, single / "new")
            (single / "new").rename(file)
        case "remove":
            file.unlink()
    message = "can't be read: No such file" if change == "remove" else "has changed since the checkpoint was opened"
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {message}"):
        reader.read("F16", shapes=[(2, 3)], dtypes=["F16"])


def test_broken_index(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]

    def index(**changes) -> None:
        (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map | changes}))

    index(c="model-2.safetensors")
    fails(sharded, "says that model-2.safetensors holds c, but it does not")
    index(b="model-1.safetensors")
    fails(sharded, "says that model-1.safetensors holds b, but it does not")
    index(a="model-9.safetensors")
    fails(sharded, "'a' lies in 'model-9.safetensors', which is missing")
    for name in ("../model-1.safetensors", "/etc/passwd", 3, None, ["model-1.safetensors"]):
        index(a=name)
        fails(sharded, f"'a' lies in {name!r}, which is not a file name")
    for name in ("", ".."):
        index(a=name)
        fails(sharded, f"'a' lies in {name!r}, which is a directory")
    for name in ("a\0b", "\ud800"):
        index(a=name)
        fails(sharded, f"'a' lies in {name!a}, which is missing")
    index(a="x" * 300)
    fails(sharded, "can't be read: File name too long")
    save_file({"a": tensor(), "b": tensor()}, sharded / "model-2.safetensors")
    index()
    fails(sharded, "a: is in both model-1.safetensors and model-2.safetensors")
    (sharded / INDEX).write_text('{"weights": 1}')
    fails(sharded, "has no weight_map")
    (sharded / INDEX).write_text('{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}')
    fails(sharded, "index.json is not JSON: 'a' comes twice in one object")


def test_what_an_index_does_not_say(sharded):
    """Sizes are not looked at, nor files that it does not list; one file beside an index comes first."""
    index = json.loads((sharded / INDEX).read_text()) | {"metadata": {"total_size": "7"}}
    (sharded / INDEX).write_text(json.dumps(index))
    (sharded / "consolidated.safetensors").write_bytes(b"anything")
    assert sorted(Reader(sharded)) == ["a", "b"]
    save_file({"c": tensor()}, sharded / SINGLE)
    assert list(Reader(sharded)) == ["c"]
