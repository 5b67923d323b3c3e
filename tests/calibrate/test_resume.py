"""Scales that `fp8x quantize` had found when it was stopped, or failed."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fp8x
from fp8x.cli import app, calibrate, resume
from fp8x.errors import CheckpointError

CODE = "e4m3_e4m3_bf16"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i} is about foxes and dogs."}) + "\n" for i in range(20)))
    return path


@pytest.fixture
def quantize(tiny_checkpoint, data, tmp_path, monkeypatch):
    """Runs the command; `runs` counts calibrations."""
    run = calibrate.run
    monkeypatch.setattr(calibrate, "run", lambda *arguments: (quantize.runs.append(None), run(*arguments))[1])

    def quantize(*options, destination=tmp_path / "out"):
        fixed = ("--recipe", CODE, "--calibrate", data, "--num-samples", 4, "--max-length", 16, "--json")
        arguments = ("quantize", tiny_checkpoint, destination, *fixed, *options)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    quantize.runs = []
    return quantize


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def fail(monkeypatch, error):
    def convert(*arguments, **options):
        raise error

    monkeypatch.setattr(fp8x, "convert", convert)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), CheckpointError("out: the disk is full")], ids=["killed", "failed"]
)
def test_the_same_command_does_not_calibrate_again(quantize, monkeypatch, tmp_path, data, error):
    whole = quantize(destination=tmp_path / "whole")
    summary = json.loads(whole.stdout)
    assert (summary["calibration_resumed"], summary["malformed"], len(quantize.runs)) == (False, 0, 1)
    with monkeypatch.context() as patch:
        fail(patch, error)
        stopped = quantize()
    assert stopped.exit_code != 0 and len(quantize.runs) == 2
    is_told = f"what was calibrated is kept in {tmp_path}/.out.partial; the same command goes on" in stopped.stderr
    assert is_told == isinstance(error, CheckpointError)
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "texts.jsonl", "whole"]
    (kept,) = (tmp_path / ".out.partial").iterdir()
    assert json.loads(kept.read_bytes()) == json.loads((tmp_path / "whole" / "calibration.json").read_bytes())
    done = quantize()
    assert done.exit_code == 0 and json.loads(done.stdout)["calibration_resumed"] is True and len(quantize.runs) == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "texts.jsonl", "whole"]


def test_what_is_not_the_same_calibrates_again(quantize, monkeypatch, tmp_path, data):
    with monkeypatch.context() as patch:
        fail(patch, KeyboardInterrupt())
        quantize()

    class Calibrates(Exception):
        pass

    def run(*arguments):
        raise Calibrates

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "run", run)
        options = [("--seed", 1), ("--batch-size", 2), ("--rule", r"layers\.0\..*=none"), ("--kv-cache", "head")]
        for changed in (*options, ("--document-rows", 2), ("--num-samples", 3)):
            assert isinstance(quantize(*changed).exception, Calibrates)
        data.write_text(data.read_text() + "\n")
        assert isinstance(quantize().exception, Calibrates)
    assert quantize("--min-tokens", 9).exit_code == 0  # begins anew, beside what is of no use
    assert sorted(os.listdir(tmp_path)) == ["out", "texts.jsonl"]


def test_what_is_damaged_is_not_taken_over(tmp_path):
    assert resume.read(tmp_path / "absent") is None
    (tmp_path / "damaged").write_text("{")
    assert resume.read(tmp_path / "damaged") is None


@pytest.mark.parametrize("place", ["/sys/fp8x", "texts.jsonl/out", "x" * 250])
def test_a_destination_that_cannot_be_written_is_refused_before_work(quantize, tmp_path, place):
    result = quantize(destination=tmp_path / place)
    assert result.exit_code == 2 and "can't be written: " in result.stderr and not quantize.runs
    assert os.listdir(tmp_path) == ["texts.jsonl"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/sys/scales.json", "can't be written: "),
        ("x" * 250, "can't be written: File name too long"),
        ("absent/scales.json", "its directory does not exist"),
        ("texts.jsonl/scales.json", "its directory does not exist"),
        (".", "is a directory; name a file in it"),
        ("/dev/null", "is no file, and would be replaced by one"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_work(tiny_checkpoint, data, tmp_path, place, message):
    arguments = ("calibrate", tiny_checkpoint, data, "--recipe", CODE, "-o", tmp_path / place)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and f"--output {tmp_path / place}: {message}" in result.stderr
    assert os.listdir(tmp_path) == ["texts.jsonl"]
