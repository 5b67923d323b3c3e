"""Times, floors and results of benchmarks: what can be shown of them without a GPU."""

import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8x.benchmark import H200, Floor, Results, copy_bandwidth, facts, hardware, time_calls, timing


def test_time_of_calls():
    inputs = [(jnp.full((64, 64), i, jnp.float32), jnp.ones((64, 64))) for i in range(3)]
    found, results = time_calls(jnp.matmul, inputs)
    assert [float(y[0, 0]) for y in results] == [0, 64, 128]
    assert found.host_seconds > 0 and 0 < found.seconds < 1 and found.calls % 3 == 0 and found.repeats >= 3
    assert found.kernels is None and "Mosaic GPU" in found.note  # there is no CUPTI here


def test_calls_are_neither_merged_nor_copied():
    inputs = [(jnp.full((64, 64), i, jnp.float32),) for i in range(3)]
    text = timing.chained(lambda x: jnp.sin(x) * 2).lower(inputs).compile().as_text()
    assert text.count(" fusion(") == 3 and " copy(" not in text


class Cupti:
    """Two kernels a call, of which one gets slower with every run."""

    def __init__(self, lost=0):
        self.launches, self.lost = [], lost

    def run(self):
        self.launches += [("mosaic_gemm", 1.0 + len(self.launches)), ("fusion", 3.0)] * 2

    def _cupti_init(self):
        self.launches = []

    def _cupti_get_timings(self, finalize):
        return self.launches[self.lost :]


def kernels_of(monkeypatch, cupti):
    monkeypatch.setattr(timing, "_cupti", lambda: cupti)
    return timing.time_queue(cupti.run, lambda _: None, calls=2)


def test_kernels_of_a_call(monkeypatch):
    found = kernels_of(monkeypatch, Cupti())
    # Of 10 runs with 2 calls of 2 kernels each, the one in the middle: (1 + 4 · 4.5) ms.
    assert found.kernels == {"mosaic_gemm": pytest.approx(19e-3), "fusion": pytest.approx(3e-3)}
    assert found.of_kernels("gemm") == pytest.approx(19e-3) and found.of_kernels("other") is None
    assert found.kernel_seconds == pytest.approx(22e-3)


def test_kernels_that_do_not_add_up_are_no_number(monkeypatch):
    found = kernels_of(monkeypatch, Cupti(lost=1))
    assert found.kernels is None and found.note == "RuntimeError: CUPTI saw 39 kernels in 10 equal runs"
    assert found.of_kernels("gemm") is None and found.kernel_seconds is None


def test_floors():
    assert Floor(bytes=48 * 10**9, flops=10**9).seconds == 0.01
    assert Floor(bytes=10**6, flops=1979 * 10**9).seconds == 0.001
    assert Floor(bytes=10**6, flops=989 * 10**9, peak=H200.bf16).seconds == 0.001


def test_sets_of_inputs_that_exceed_the_cache():
    assert [timing.sets_needed(2**20 * size) for size in (0, 1, 30, 60, 500)] == [8, 8, 5, 3, 2]


def test_copying():
    assert 1e8 < copy_bandwidth(2**22) < 1e12


def test_facts(monkeypatch):
    monkeypatch.setenv("FP8X_COMMIT", "0123abc")
    found = facts()
    assert found["device"] == "cpu" and found["jax"] == jax.__version__ and found["commit"] == "0123abc"
    assert hardware._output("no-such-command") is None and hardware._output("false") is None
    assert hardware._output("printf", "one\ntwo\n") == "one"


def test_results_outlive_the_run(tmp_path):
    path = tmp_path / "out.json"
    first = Results(path, lambda: {"device": "a"})
    first.add(case="x", seconds=1.0)
    first.add(case="y", error="hung")
    again = Results(path, lambda: pytest.fail("they are there"))
    assert again.has(case="x") and not again.has(case="z") and not again.has(case="y", error=None)
    again.add(case="z")
    document = json.loads(path.read_text())
    assert document["facts"] == {"device": "a"}
    assert [result["case"] for result in document["results"]] == ["x", "y", "z"]
    assert [result["case"] for result in again] == ["x", "y", "z"] and np.isfinite(document["results"][0]["seconds"])


def test_attempts(tmp_path):
    path = tmp_path / "out.json"
    results = Results(path, dict)
    results.attempt({"case": 1}, lambda: {"seconds": 1.0})
    results.attempt({"case": 1}, lambda: pytest.fail("it is there"))
    results.attempt({"case": 2}, lambda: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        results.attempt({"case": 3}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    again = Results(path, dict)  # of the next process
    assert list(again) == [
        {"case": 1, "seconds": 1.0},
        {"case": 2, "failure": "ZeroDivisionError: division by zero"},
        {"case": 3, "failure": "the process did not survive it, or was killed"},
    ]

    def lose_the_gpu():
        raise ValueError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")

    with pytest.raises(RuntimeError, match="ILLEGAL_ADDRESS"):
        again.attempt({"case": 4}, lose_the_gpu)
    assert len(list(Results(path, dict))) == 4


SHARED = """
import sys, time
from pathlib import Path
from fp8x.benchmark import Results
from fp8x.benchmark.timing import alone
results = Results(Path("out.json"), dict)
def run():
    with alone(), alone():
        start = time.time()
        time.sleep(0.05)
        return {"process": sys.argv[1], "start": start, "end": time.time()}
for case in range(12):
    results.attempt({"case": case}, run)
"""


def test_processes_share_cases_and_measure_one_at_a_time(tmp_path):
    command, environment = [sys.executable, "-c", SHARED], os.environ | {"FP8X_GPU_LOCK": str(tmp_path / "gpu")}
    children = [subprocess.Popen([*command, name], cwd=tmp_path, env=environment) for name in "ab"]
    assert [child.wait() for child in children] == [0, 0]
    found = sorted(Results(tmp_path / "out.json", dict), key=lambda result: result["start"])
    assert sorted(result["case"] for result in found) == list(range(12))
    assert all(before["end"] <= after["start"] for before, after in itertools.pairwise(found))
