"""`examples/generate_multihost.py`, in two processes on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fp8x
from fp8x.models import generate

ROOT = Path(__file__).parents[2]
# Weight-only, in float32: sums in another order move no code, and no token of random weights.
CODE, PROMPT = "e4m3_f32", "The fox"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,expert=2", "tensor=2,data=2"])
def test_two_processes_write_what_one_does(mesh, tiny_checkpoint, byte_tokenizer, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, ROOT / "examples/generate_multihost.py", tiny_checkpoint, PROMPT, f"--mesh={mesh}"]
    command += [f"--recipe={CODE}", "--max-new-tokens=8", f"--coordinator={address}", "--num-processes=2"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, f"--process-id={index}"], env=environment, **pipes) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    ids = np.array([byte_tokenizer.encode(PROMPT).ids])
    model = fp8x.load(tiny_checkpoint, CODE)
    found = generate(model, ids, max_new_tokens=8, eos_id=model.config.eos_token_id)
    text = byte_tokenizer.decode(np.asarray(found)[0].tolist())
    assert outputs[0][0].endswith(f"{text}\n" * 2) and text not in outputs[1][0]  # gloo prints too
