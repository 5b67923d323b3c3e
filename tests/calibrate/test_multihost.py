"""`examples/calibrate_multihost.py`, in two processes on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fp8x
from fp8x.calibrate.data import pack, read_texts
from fp8x.calibrate.sidecar import read

ROOT = Path(__file__).parents[2]
CODE, LENGTH = "e4m3_e4m3_bf16", 16


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where what one process compiles is kept for the next."""
    directory = str(tmp_path_factory.mktemp("compiled"))
    return {"JAX_COMPILATION_CACHE_DIR": directory, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


@pytest.fixture
def start(tiny_checkpoint, tmp_path, compiled):
    """Starts both processes, of two devices each, on 10 rows."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    texts = [f"Document {i}: the quick brown fox jumps over the lazy dog" for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    started = []

    def start():
        for index in range(2):
            options = {"recipe": CODE, "num-samples": 10, "max-length": LENGTH, "batch-size": 1, "heartbeat": 10}
            options |= {"coordinator": address, "num-processes": 2, "process-id": index}
            command = [sys.executable, "examples/calibrate_multihost.py", tiny_checkpoint, "texts.jsonl", "out.json"]
            command[1], command[3:] = ROOT / command[1], [tmp_path / name for name in command[3:]]
            command += [f"--{name}={value}" for name, value in options.items()]
            environment = os.environ | compiled | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, env=environment, **pipes))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()  # closes the pipes


def test_two_processes_equal_one_device_bit_for_bit(start, tiny_checkpoint, tmp_path, byte_tokenizer):
    processes = start()
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    sidecar = read(tmp_path / "out.json")
    rows = pack(read_texts(tmp_path / "texts.jsonl"), byte_tokenizer, LENGTH, 10, bos_id=256)
    assert sidecar.dataset.samples == len(rows) == 10 and sidecar.dataset.tokens == 160
    # Five rows for each process: of two devices, which leaves one of them idle in the last step.
    with jax.default_device(jax.devices("cpu")[0]):
        expected = fp8x.calibrate(fp8x.load(tiny_checkpoint, CODE), list(rows[:, None]))
    for path, layer in expected.layers.items():
        for name in ("amax", "scale", "tokens"):
            np.testing.assert_array_equal(getattr(sidecar.report.layers[path], name), getattr(layer, name))


@pytest.mark.slow
def test_where_one_process_dies_the_other_fails_and_nothing_is_written(start, tmp_path):
    survivor, victim = start()
    for line in victim.stdout:
        if "batch 1" in line:
            break
    victim.send_signal(signal.SIGKILL)
    output, _ = survivor.communicate(timeout=300)
    assert survivor.returncode != 0 and "process 0: batch 1" in output
    assert not (tmp_path / "out.json").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"texts.jsonl"}
