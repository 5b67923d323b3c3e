"""benchmarks/on_gpu.py from end to end, at small shapes, on XLA; and what it hands to the benchmarks."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OUT", str(tmp_path))
    yield importlib.import_module("on_gpu")
    for name in ("on_gpu", "supervise"):
        sys.modules.pop(name, None)


def test_a_call_stays_within_its_time(on_gpu, tmp_path, monkeypatch, capsys):
    ends, start = [], time.monotonic()

    def note(end, log) -> str:
        ends.append(end)
        log.touch()
        return "exit 0"

    monkeypatch.setattr(on_gpu, "run_again", lambda command, results, log, end, **_: note(end, log))
    monkeypatch.setattr(on_gpu, "run", lambda command, log, end, news, **_: note(end, log))
    h100 = subprocess.CompletedProcess([], 0, stdout="81559\n")
    monkeypatch.setattr(on_gpu.subprocess, "run", lambda *_, **__: h100)
    for name in ("gpu.lock", "moe.running", "moe.json"):
        (tmp_path / name).touch()
    for call in ("products", "models", "tests"):
        on_gpu.main([call, "--seconds", "100"])
    assert len(ends) == 6 + on_gpu.BLOCK_PROCESSES + 4, "six processes fit the memory"
    assert max(ends) <= time.monotonic() + 100
    assert ends[0] - start == pytest.approx(50, abs=5)
    assert capsys.readouterr().out.count("exit 0") == len(ends)
    assert not list(tmp_path.glob("log.[0-9]*"))
    assert {path.name for path in tmp_path.iterdir()} <= {"moe.json", "log.txt", "clocks.csv"}, "what comes back"


def test_its_tests_are_there(on_gpu):
    assert all((on_gpu.ROOT / path).exists() for path in on_gpu.TESTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "files"), [("tests", ["tests"]), ("products", ["grouped", "quantize", "moe"]), ("models", ["decode"])]
)
def test_from_end_to_end(call, files, tmp_path):
    command = [sys.executable, BENCHMARKS / "on_gpu.py", call, "--tiny", "--seconds", "900"]
    environment = os.environ | {"OUT": str(tmp_path), "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "stalled" not in done.stdout and "exit 0" in done.stdout, done.stdout + (tmp_path / "log.txt").read_text()
    for name in files:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(found if name == "tests" else found["results"]) > 1
