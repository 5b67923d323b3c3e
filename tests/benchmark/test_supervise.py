"""What hangs, crashes or loses the GPU costs its own process and nothing else."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
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
