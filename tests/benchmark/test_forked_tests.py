"""What hangs, crashes or loses the GPU costs its own process and nothing else; and collecting compiles nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ON_A_GPU = ["tests/gpu", "tests/ops", "tests/test_numerics.py"]
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


def run(cwd, *arguments, **environment):
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "FP8X_BACKEND": "xla"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:xdist", "-p", "forked_tests", "-s"]
    command += ["-p", "no:cacheprovider", "--results", "out.json", "--processes", "2", "--stall", "5", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | paths | environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow  # starts pytest three times
def test_each_outcome(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text("import no_such_module")
    done = run(tmp_path, "test_it.py", "test_other.py")
    found = json.loads((tmp_path / "out.json").read_text())
    found = {name.removeprefix("test_it.py::test_"): value for name, value in found.items()}
    assert "no_such_module" in found.pop("test_other.py")["text"]
    last = next(name for name in found if name.startswith("comes_last"))
    assert {name: value["outcome"] for name, value in found.items()} == {
        "passes": "passed",
        "hangs": "stalled",
        "fails": "failed",
        "dies": "exit 7",
        "skips": "skipped",
        "loses_the_gpu": "failed",
        last: "passed",
    }, done.stdout + done.stderr
    assert "because" in found["fails"]["text"] and "no reason" in found["skips"]["text"]
    (count,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert count == {"not collected": 1, "passed": 2, "stalled": 1, "failed": 2, "exit 7": 1, "skipped": 1}
    assert done.returncode == 1
    # What is there is not run again, and nothing begins after the end.
    (tmp_path / "test_it.py").write_text("def test_passes(): assert False\ndef test_is_new(): pass\n")
    assert '{"passed": 1, "not run": 1}' in run(tmp_path, "test_it.py", "--seconds", "0").stdout
    assert '{"passed": 2}' in run(tmp_path, "test_it.py").stdout


@pytest.mark.slow
def test_a_backend_that_collecting_starts_is_an_error(tmp_path):
    (tmp_path / "test_it.py").write_text("import jax.numpy as jnp\nX = jnp.ones(3)\ndef test_it(): pass\n")
    assert "collecting the tests started a backend of JAX" in run(tmp_path, "test_it.py").stderr


@pytest.mark.slow
def test_collecting_what_runs_on_a_gpu_starts_no_backend(tmp_path):
    """A compilation takes a GPU a third of a second, and there were 300 of them in each process."""
    done = run(ROOT, *ON_A_GPU, "--results", str(tmp_path / "out.json"), "--seconds", "0", "-m", "not slow")
    assert '"not run": ' in done.stdout, done.stdout + done.stderr
