"""Files written in any order, and conversions that are killed."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from fp8x.checkpoint import Reader, Writer, blocks
from fp8x.checkpoint.blocks import BLOCK, BlockFile, Disk
from fp8x.checkpoint.journal import Journal
from fp8x.checkpoint.resumable import ResumableWriter
from fp8x.errors import CheckpointError

SPECS = {"a": ("F8_E4M3", (100, 3)), "b": ("F32", (7,)), "none": ("BF16", (0, 2)), "c": ("U8", (50,)), "d": ("F32", ())}
SHARD = 310  # bytes: `a` fills the first file, the rest the second


def values(name: str) -> np.ndarray:
    dtype, shape = SPECS[name]
    size = int(np.prod(shape)) * {"F32": 4, "BF16": 2}.get(dtype, 1)
    return np.random.default_rng(len(name) + ord(name[0])).integers(0, 255, size).astype(np.uint8)


def write(writer: ResumableWriter, names=tuple(SPECS)) -> None:
    for name in names:
        if not writer.has(name):
            data = values(name)
            for start in reversed(range(0, data.size, 33)):
                writer.write(name, start, data[start : start + 33])


def run(path, identity="x", **options) -> None:
    with ResumableWriter(path, SPECS, identity, max_shard_bytes=SHARD, **options) as writer:
        write(writer)
        writer.add_json("config.json", {})


@pytest.mark.parametrize("size", [0, 1, 4095, BLOCK, 2 * BLOCK + 77])
def test_a_file_in_any_order_by_several_threads(tmp_path, size):
    data = np.random.default_rng(0).integers(0, 255, size).astype(np.uint8)
    cuts = sorted({0, size, *np.random.default_rng(1).integers(0, size + 1, 20).tolist()})
    pieces = list(itertools.pairwise(cuts))
    np.random.default_rng(2).shuffle(pieces)
    disk, done = Disk(), []
    journal = Journal(tmp_path / "journals" / "file", tmp_path / "file", BLOCK, size)
    file = BlockFile(tmp_path / "file", size, disk, lambda: done.append(True), journal)

    def work(part) -> None:
        for start, stop in part:
            file.write(start, data[start:stop])

    threads = [threading.Thread(target=work, args=(pieces[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    disk.close()
    disk.check()
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert bool(size) == bool(done)


def test_what_is_written_is_read(tmp_path):
    run(tmp_path / "out")
    reader = Reader(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    for name, (dtype, shape) in SPECS.items():
        assert reader.read(name, shapes=[shape], dtypes=[dtype]).tobytes() == values(name).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_safetensors_reads_it_too(tmp_path):
    from safetensors import safe_open

    run(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model-00002-of-00002.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("b").tobytes() == values("b").tobytes()


def test_an_interrupted_run_goes_on(tmp_path):
    run(tmp_path / "whole")
    with (
        pytest.raises(KeyboardInterrupt),
        ResumableWriter(tmp_path / "out", SPECS, "x", max_shard_bytes=SHARD) as writer,
    ):
        write(writer, ["a", "b"])
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()
    (first,) = (tmp_path / ".out.partial" / "out").glob("*.safetensors")
    made = first.stat().st_ino
    with ResumableWriter(tmp_path / "out", SPECS, "x", max_shard_bytes=SHARD) as writer:
        assert [name for name in SPECS if writer.has(name)] == ["a"]
        write(writer)
        writer.add_json("config.json", {})
    assert (tmp_path / "out" / first.name).stat().st_ino == made
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_lies_in_a_finished_file_is_not_written_again(tmp_path):
    first = ResumableWriter(tmp_path / "out", SPECS, "x", max_shard_bytes=SHARD)
    with pytest.raises(KeyboardInterrupt), first as writer:
        write(writer, ["a"])
        raise KeyboardInterrupt
    with ResumableWriter(tmp_path / "out", SPECS, "x", max_shard_bytes=SHARD) as writer:
        writer.write("a", 0, values("a"))  # as a job does whose other tensors are missing
        write(writer)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_ctrl_c_at_the_end_keeps_the_files_too(tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResumableWriter, "_finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    with ResumableWriter(tmp_path / "out", SPECS, "x", max_shard_bytes=SHARD) as writer:
        assert all(map(writer.has, SPECS))


@pytest.mark.parametrize("specs", [{}, {"none": ("F32", (0, 3))}], ids=str)
def test_nothing_to_write(tmp_path, specs):
    with ResumableWriter(tmp_path / "out", specs, "x") as writer:
        writer.add_json("config.json", {})
    assert set(Reader(tmp_path / "out")) == set(specs)


def test_files_of_another_run_are_not_used(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        ResumableWriter(tmp_path / "out", SPECS, "x", max_shard_bytes=SHARD) as writer,
    ):
        write(writer, ["a"])
        raise KeyboardInterrupt
    unfinished = ResumableWriter(tmp_path / "out", SPECS, "y", max_shard_bytes=SHARD)
    with pytest.warns(UserWarning, match="removed what a run with other arguments had left"), unfinished as writer:
        assert not any(map(writer.has, SPECS))
        write(writer)


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), ResumableWriter(tmp_path / "out", SPECS, "x") as writer:
        write(writer, ["a"])
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_less_than_planned_is_an_error(tmp_path):
    expected = pytest.raises(CheckpointError, match="got less than was planned")
    with expected, ResumableWriter(tmp_path / "out", SPECS, "x") as writer:
        write(writer, ["a"])
    assert not (tmp_path / "out").exists()


def test_a_destination_that_is_there_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        run(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_two_at_once(tmp_path):
    with ResumableWriter(tmp_path / "out", SPECS, "x") as writer:
        with pytest.raises(CheckpointError, match="another process is writing it"):
            run(tmp_path / "out")
        write(writer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_room_says_so_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(CheckpointError, match=r"out: needs [\d,]+ bytes, but 5 are free"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(blocks.os, "pwrite", full)
    with pytest.raises(CheckpointError, match=r"out: can't be written: .*No space left on device"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_disks_without_direct_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "O_DIRECT", 0)
    run(tmp_path / "out")
    assert Reader(tmp_path / "out").stored("a").shape == (100, 3)


CONVERT = """
import json, os, signal, sys, time
import fp8x

def renamed(source, target, rename=os.rename):
    rename(source, target)
    if str(target) == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

os.rename = renamed

def progress(done, total):
    if done / total >= float(sys.argv[3]):
        time.sleep(0.2)  # what is on its way to the disk gets there; other threads wait for this one
        os.kill(os.getpid(), signal.SIGKILL)

fp8x.convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[4]), max_shard_bytes=30_000, progress=progress)
"""


def killed(source, out, share: float, options: dict) -> None:
    """Converts until so much is done, and is killed."""
    arguments = [sys.executable, "-c", CONVERT, str(source), str(out), str(share), json.dumps(options)]
    found = subprocess.run(arguments, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert found.returncode == -signal.SIGKILL, found.stderr


def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    "share", [0.6, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.01, 0.3, 0.9, 1.0, 1.1))]
)
def test_a_killed_conversion_ends_with_the_same_bytes(tiny_checkpoint, tmp_path, share):
    import fp8x

    fp8x.convert(tiny_checkpoint, tmp_path / "whole", "mxfp8_bf16", max_shard_bytes=30_000)
    out = tmp_path / "out"
    killed(tiny_checkpoint, out, share, {"recipe": "mxfp8_bf16"})
    assert out.exists() == (share > 1)
    done = fp8x.convert(tiny_checkpoint, out, "mxfp8_bf16", max_shard_bytes=30_000)
    assert share < 0.3 or done.bytes_resumed > 0
    # At 1.0 the last file may still be on its way to its name.
    assert share <= 1 or (done.bytes_resumed, done.bytes_read) == (done.bytes_written, 0)
    assert len(contents(out)) > 5 and contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
@pytest.mark.parametrize("share", [pytest.param(share, marks=pytest.mark.slow) for share in (0.1, 0.5, 0.8)])
@pytest.mark.parametrize(
    "source, options", [("mxfp8", {"format": "mxfp4"}), ("mxfp4", {"recipe": "bf16"}), ("mxfp4", {})]
)
def test_a_killed_conversion_of_experts_in_one_tensor(tmp_path, source, options, share):
    """They go there one by one: a tensor that lacks some of them is begun anew."""
    import fp8x

    rng, tensors = np.random.default_rng(0), {}
    for layer in range(8):
        for name, n, k in (("gate_up_proj", 128, 64), ("down_proj", 64, 64)):
            block = f"model.layers.{layer}.mlp.experts.{name}"
            tensors[f"{block}_blocks"] = rng.integers(0, 256, (4, n, k // 32, 16), np.uint8)
            tensors[f"{block}_scales"] = rng.integers(100, 140, (4, n, k // 32), np.uint8)
            tensors[f"{block}_bias"] = rng.standard_normal((4, n), np.float32)
    with Writer(tmp_path / "mxfp4") as writer:
        for name, array in tensors.items():
            writer.add(name, array)
        writer.add_json("config.json", {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}})
    fp8x.convert(tmp_path / "mxfp4", tmp_path / "mxfp8")
    fp8x.convert(tmp_path / source, tmp_path / "whole", **options, max_shard_bytes=30_000)
    killed(tmp_path / source, tmp_path / "out", share, options)
    assert not (tmp_path / "out").exists()
    seen = []
    done = fp8x.convert(
        tmp_path / source, tmp_path / "out", **options, max_shard_bytes=30_000, progress=lambda *at: seen.append(at)
    )
    assert share < 0.5 or 0 < done.bytes_resumed < done.bytes_written
    assert seen[0][0] > 0 and seen[-1][0] == seen[-1][1] == max(at for at, _ in seen)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mxfp4", "mxfp8", "out", "whole"]
