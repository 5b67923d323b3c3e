"""What hangs, crashes or loses the GPU costs its own process and nothing else."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TESTS = """
import os, time
import pytest

def test_passes(): pass
def test_hangs(): time.sleep(60)
def test_fails(): assert 1 == 2, "because"
def test_dies(): os._exit(7)
def test_skips(): pytest.skip("no reason")
def test_loses_the_gpu(): raise RuntimeError("INTERNAL: CUDA_ERROR_LAUNCH_FAILED")
@pytest.mark.parametrize("block", ["1×128, and so on"])
def test_comes_last(block): assert os.environ["FP8X_BACKEND"] == "xla"
"""
BENCHMARK = """
import json, os, pathlib, sys, time
path = pathlib.Path(sys.argv[1])
assert sys.argv[2] == "--seconds" and int(sys.argv[3]) > 5
done = json.loads(path.read_text()) if path.exists() else []
path.write_text(json.dumps([*done, len(done)]))
if len(done) == 0: time.sleep(60)
if len(done) == 1: os._exit(3)
"""


@pytest.fixture
def supervise(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("supervise")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "STALL", 5.0)
    yield module
    sys.modules.pop("supervise", None)


def soon(seconds=60):
    return time.monotonic() + seconds


@pytest.mark.slow  # a dozen processes that start pytest
def test_tests(supervise, tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "PROCESSES", 2)
    monkeypatch.setattr(supervise, "STALL", 20.0)
    monkeypatch.setattr(supervise, "TEST_STALL", 10.0)
    (tmp_path / "test_it.py").write_text(TESTS)
    log, path = tmp_path / "log.txt", tmp_path / "out.json"
    count = supervise.run_tests(["test_it.py"], supervise.Outcomes(path), log, soon(), FP8X_BACKEND="xla")
    found = {name.removeprefix("test_it.py::test_"): value for name, value in json.loads(path.read_text()).items()}
    last = next(name for name in found if name.startswith("comes_last"))
    assert {name: value["outcome"] for name, value in found.items()} == {
        "passes": "passed",
        "hangs": "stalled",
        "fails": "failed",
        "dies": "exit 7",
        "skips": "skipped",
        "loses_the_gpu": "failed",
        last: "passed",
    }
    assert "because" in found["fails"]["text"] and "no reason" in found["skips"]["text"]
    assert count == {"passed": 2, "stalled": 1, "failed": 2, "exit 7": 1, "skipped": 1}
    assert "test_it.py" in log.read_text() and not list(tmp_path.glob("log.[0-9]"))
    # What is there is not run again.
    again = supervise.Outcomes(path)
    (tmp_path / "test_it.py").write_text(TESTS + "def test_is_new(): pass\n")
    assert supervise.run_tests(["test_it.py"], again, log, soon())["passed"] == 3
    assert supervise.run_tests(["absent.py"], again, log, soon()) == {}
    assert "absent.py" in again.of["absent.py"]["text"]


def test_a_benchmark_that_is_killed_and_dies_goes_on(supervise, tmp_path):
    (tmp_path / "it.py").write_text(BENCHMARK)
    command, results = [sys.executable, "it.py", "out.json"], tmp_path / "out.json"
    assert supervise.run_again(command, results, tmp_path / "log.txt", soon()) == "exit 0"
    assert json.loads(results.read_text()) == [0, 1, 2]


def test_a_benchmark_that_can_not_begin_is_given_up(supervise, tmp_path):
    command = [sys.executable, "absent.py"]
    assert supervise.run_again(command, tmp_path / "out.json", tmp_path / "log.txt", soon()) == "exit 2"


def test_time_is_up(supervise, tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    before = time.monotonic()
    assert supervise.run(command, tmp_path / "log.txt", before + 0.5, lambda: None) == "out of time"
    assert time.monotonic() - before < 10
