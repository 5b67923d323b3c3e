"""What a kill leaves beside a destination, at every step, and what the next run makes of it."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fp8x
from fp8x.checkpoint import Reader, Writer
from fp8x.checkpoint.leftovers import lock
from fp8x.checkpoint.resumable import FINISHED, ResumableWriter, finished_plan
from fp8x.cli import app
from fp8x.errors import CheckpointError

SPECS = {"a": ("U8", (100,)), "b": ("F32", (7,)), "none": ("BF16", (0, 2))}


def resumable(path, identity="x") -> ResumableWriter:
    return ResumableWriter(path, SPECS, identity, max_shard_bytes=100)


def fill(writer: ResumableWriter, names=("a", "b")) -> None:
    for name in names:
        data = {"a": np.arange(100, dtype=np.uint8), "b": np.arange(28, dtype=np.uint8)}[name]
        writer.write(name, 0, data)


def convert(path, identity="x") -> None:
    with resumable(path, identity) as writer:
        fill(writer)
        writer.add_json("config.json", {"model_type": "other"})


def save(path) -> None:
    with Writer(path) as writer:
        writer.add("a", np.zeros(4, np.float32))
        writer.add_json("config.json", {})


def interrupted(path, identity="x", names=("a",)) -> Path:
    """A conversion that was stopped; its process lives, but holds no lock any more."""
    with pytest.raises(KeyboardInterrupt), resumable(path, identity) as writer:
        fill(writer, names)
        raise KeyboardInterrupt
    return path.with_name(f".{path.name}.partial")


def killed_save(path) -> Path:
    left = path.with_name(f".{path.name}.tmp-0123abcd")
    left.mkdir()
    (left / "shard-00001.safetensors").write_bytes(bytes(123))
    return left


def listing(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_what_a_conversion_left_goes_when_a_model_is_saved(tmp_path):
    left = interrupted(tmp_path / "out")
    size = sum(file.stat().st_size for file in left.rglob("*") if file.is_file())
    with pytest.warns(
        UserWarning, match=rf"out: removed what a run that was killed had left: {left} \({size:,} bytes\)"
    ):
        save(tmp_path / "out")
    assert listing(tmp_path) == ["out"] and list(Reader(tmp_path / "out")) == ["a"]


def test_what_a_save_left_goes_when_a_checkpoint_is_converted(tmp_path):
    left = killed_save(tmp_path / "out")
    with pytest.warns(UserWarning, match=rf"out: removed what a run that was killed had left: {left} \(123 bytes\)"):
        convert(tmp_path / "out")
    assert listing(tmp_path) == ["out"] and set(Reader(tmp_path / "out")) == set(SPECS)


def test_what_a_conversion_with_other_arguments_left(tmp_path):
    left = interrupted(tmp_path / "out", "x")
    with pytest.warns(UserWarning, match=rf"out: removed what a run with other arguments had left: {left} \([\d,]+ by"):
        convert(tmp_path / "out", "y")
    assert listing(tmp_path) == ["out"]


def test_what_was_resumed_and_what_is_empty_needs_no_word(tmp_path):
    interrupted(tmp_path / "out")
    (tmp_path / ".out.tmp-0123abcd").mkdir()
    convert(tmp_path / "out")  # a warning would be an error
    interrupted(tmp_path / "other", names=())
    convert(tmp_path / "other", "y")
    assert listing(tmp_path) == ["other", "out"]


def test_what_a_living_process_writes_stays(tmp_path):
    converting, saving = interrupted(tmp_path / "out"), killed_save(tmp_path / "out")
    held = [lock(saving), lock(converting)]
    try:
        save(tmp_path / "out")
        assert listing(tmp_path) == sorted([saving.name, converting.name, "out"])
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            convert(tmp_path / "out")
        os.rename(tmp_path / "out", tmp_path / "saved")
        with pytest.raises(CheckpointError, match="another process is writing it"):
            convert(tmp_path / "out")
        os.close(held.pop())
        convert(tmp_path / "out")
        assert listing(tmp_path) == sorted([saving.name, "out", "saved"])
    finally:
        for descriptor in held:
            os.close(descriptor)


@pytest.fixture
def no_locks(monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)


def test_without_locks_nothing_is_removed(tmp_path, no_locks):
    partial, left = interrupted(tmp_path / "out"), killed_save(tmp_path / "out")
    match = rf"no locks, so .* stays: {partial} \([\d,]+ bytes\), {left} \(123 bytes\); remove it if none is"
    with pytest.warns(UserWarning, match=match):
        save(tmp_path / "out")
    assert listing(tmp_path) == sorted([left.name, partial.name, "out"])
    os.rename(tmp_path / "out", tmp_path / "saved")
    before = sorted(partial.rglob("*"))
    with (
        pytest.warns(UserWarning, match=rf"no locks, so .* stays: {left} \(123 bytes\)"),
        pytest.raises(CheckpointError, match=rf"{partial} .* has no locks; remove it if no process is writing there"),
    ):
        convert(tmp_path / "out", "y")
    assert sorted(partial.rglob("*")) == before
    with pytest.warns(UserWarning) as seen:
        convert(tmp_path / "out", "x")
    assert any("is taken for the former, and the run goes on there" in str(each.message) for each in seen)
    assert listing(tmp_path) == sorted([left.name, "out", "saved"])


# Kills itself before each of its calls to the system in turn, until one run is through.
EVERY_STEP = """
import json, os, signal, sys
from pathlib import Path
from test_leftovers import convert, listing, resumable

CALLS = ("rename", "unlink", "rmdir", "mkdir", "fsync", "ftruncate", "pwrite", "open")

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work())
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_at(step, path):
    left = [step]
    def counted(call):
        def counting(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return counting
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    convert(path)
    return 0

def again(path):
    if resumable(path).is_complete:
        resumable(path).complete()
        return 1
    convert(path)
    return 0

base, results, is_there = Path(sys.argv[1]), [], sys.argv[2] == "there"
for step in range(1000):
    path = base / str(step) / "out"
    path.parent.mkdir()
    if is_there:
        path.mkdir()
    ended = child(lambda: killed_at(step, path))
    was_there, left = (path / "config.json").exists(), listing(path if is_there else path.parent)
    second = child(lambda: again(path)) if ended else None
    results.append((ended, was_there, left, second, listing(path.parent)))
    if not ended:
        break
print(json.dumps(results))
"""


def every_step(tmp_path, *, is_there: bool) -> list[list]:
    """Of every kill: how it ended, whether all was there, beside what; how the next run ended, and what was there."""
    command = [sys.executable, "-c", EVERY_STEP, str(tmp_path), "there" if is_there else ""]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *killed, through = json.loads(run.stdout)
    assert (through[0], through[1], through[3]) == (0, True, None) and len(killed) > 30
    assert all(ended == -signal.SIGKILL for ended, *_ in killed)
    expected = {file.name: file.read_bytes() for file in (tmp_path / str(len(killed)) / "out").iterdir()}
    for step, (*_, beside) in enumerate([*killed, through]):
        assert beside == ["out"], step
        found = {file.name: file.read_bytes() for file in (tmp_path / str(step) / "out").iterdir()}
        assert found == expected, step
    return killed


def test_a_kill_at_every_step(tmp_path):
    killed = every_step(tmp_path, is_there=False)
    after = [(was_there, left, second) for _, was_there, left, second, _ in killed]
    # Until the directory has its name the same call goes on; then it says that all is there.
    renamed = [was_there for was_there, *_ in after].index(True)
    assert all(was_there == (step >= renamed) for step, (was_there, *_) in enumerate(after))
    assert {second for _, _, second in after[:renamed]} == {0}
    # The last step removes a directory that says nothing any more; then, and later, the destination exists.
    assert [second for _, _, second in after[renamed:]] == [1] * (len(after) - renamed - 1) + [9]
    assert all(".out.partial" in left for _, left, _ in after[renamed:])


def test_a_kill_at_every_step_of_filling_a_directory(tmp_path):
    killed = every_step(tmp_path, is_there=True)
    seconds = [second for *_, second, _ in killed]
    # All is made (0), or only moved (1); of the last step nothing is left to do.
    assert seconds == sorted(seconds) and seconds.count(9) == 1 and set(seconds) == {0, 1, 9}
    # What is half moved has no config.json, and nobody reads it.
    moving = [left for _, was_there, left, second, _ in killed if second == 1 and not was_there]
    assert len(moving) >= 3 and any("model-00001-of-00002.safetensors" in left for left in moving)


def just_finished(monkeypatch, work, *arguments) -> None:
    """As killed right after the directory got its name."""

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableWriter, "tidy", interrupted)
        work(*arguments)


def test_a_destination_that_another_has_made_meanwhile_is_not_ours(tmp_path, monkeypatch):
    just_finished(monkeypatch, convert, tmp_path / "out")
    assert resumable(tmp_path / "out").is_complete and finished_plan(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(tmp_path / "out", "y")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save(tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    content = file.read_bytes()
    for change in (file.unlink, lambda: file.write_bytes(content), (tmp_path / "out" / "mine").touch):
        change()
        assert finished_plan(tmp_path / "out") is None
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            convert(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "mine")
    convert(tmp_path / "out")  # what says that it was complete is no obstacle
    assert listing(tmp_path) == ["mine", "out"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"plan": 1}', '{"plan": "x", "files": null}'])
def test_half_of_what_says_that_it_is_complete(tmp_path, content):
    left = interrupted(tmp_path / "out")
    (left / FINISHED).write_text(content)
    convert(tmp_path / "out")
    assert listing(tmp_path) == ["out"]


def test_the_same_conversion_says_that_all_is_there(tiny_checkpoint, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    out = tmp_path / "out"
    just_finished(monkeypatch, fp8x.convert, tiny_checkpoint, out, "mxfp8_bf16")
    files = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    for other in ("e4m3_bf16", "bf16"):
        with pytest.raises(CheckpointError, match="out: exists and is not empty"):
            fp8x.convert(tiny_checkpoint, out, other)
    left = tmp_path / ".out.partial"
    mark = (left / FINISHED).read_text()
    seen = []
    done = fp8x.convert(tiny_checkpoint, out, "mxfp8_bf16", progress=lambda *pair: seen.append(pair))
    reader = Reader(out)
    total = sum(reader.stored(name).nbytes for name in reader)
    assert (done.format, done.bytes_read, done.bytes_written, done.bytes_resumed) == (
        "compressed-tensors",
        0,
        total,
        total,
    )
    ((done_bytes, of),) = seen
    assert done_bytes == of > total
    assert listing(tmp_path) == ["out"] and {file: file.stat().st_mtime_ns for file in out.iterdir()} == files
    with pytest.raises(CheckpointError, match="out: exists and is not empty"):
        fp8x.convert(tiny_checkpoint, out, "mxfp8_bf16")  # from now on it is like any other
    left.mkdir()
    (left / FINISHED).write_text(mark)
    command = ["quantize", str(tiny_checkpoint), str(out), "-r", "mxfp8_bf16"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0 and "were there from a run that was stopped" in " ".join(run.stdout.split())
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 2 and "exists and is not empty" in run.stderr
