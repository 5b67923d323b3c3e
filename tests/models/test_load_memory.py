"""How much memory loading takes: the model as it will be, and about one matrix."""

import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import write_mixtral

SMALL = Path(__file__).parents[1] / "goldens" / "mixtral"
COMPILING = 64 * 2**20  # what the programs that convert matrices take, whatever the model

# In a process of its own, since the peak is the process's.
PROGRAM = """
import re, sys, jax, fp8x
from flax import nnx
from pathlib import Path

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

path, small, code = sys.argv[1:]
fp8x.load(small, code or None)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
model = fp8x.load(path, code or None)
print(sum(array.nbytes for array in jax.tree.leaves(nnx.state(model))), status("VmHWM") - before)
"""


def measured(path: Path, code: str) -> tuple[int, int]:
    """The bytes of the model, and by how much the peak of resident memory grew."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, path, SMALL, code], capture_output=True, text=True, check=True)
    size, growth = map(int, run.stdout.split())
    return size, growth


@pytest.mark.parametrize(
    ("code", "hidden", "intermediate"),
    [
        ("e4m3_e4m3_bf16_dynamic", 1024, 1024),
        pytest.param("", 1024, 2048, marks=pytest.mark.slow),
        pytest.param("mxfp8_bf16", 1024, 2048, marks=pytest.mark.slow),
        pytest.param("fp8_e4m3fn_bf16_block_scale", 1024, 2048, marks=pytest.mark.slow),
    ],
)
def test_peak_is_the_model_and_a_matrix(tmp_path, code, hidden, intermediate):
    stored = write_mixtral(tmp_path / "model", hidden, intermediate)
    matrix = 2 * hidden * intermediate
    assert stored > 100 * 2**20
    size, growth = measured(tmp_path / "model", code)
    # A matrix in 16 bits, and in 32 while it is quantized. The mapped file would be 100 MB or more.
    assert size < growth < size + 5 * matrix + COMPILING
