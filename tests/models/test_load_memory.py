"""How much memory loading takes: the model as it will be, and about one matrix."""

from pathlib import Path

import pytest
from resident import measure
from synthetic import write_gpt_oss, write_mixtral

SMALL = Path(__file__).parents[1] / "goldens" / "mixtral"
COMPILING = 64 * 2**20  # what the programs that convert matrices take, whatever the model

LOAD = """
model = fp8x.load(path, {code!r})
size = sum(array.nbytes for array in jax.tree.leaves(nnx.state(model)))
"""


@pytest.mark.parametrize(
    ("code", "hidden", "intermediate"),
    [
        ("e4m3_e4m3_bf16_dynamic", 1024, 1024),
        pytest.param(None, 1024, 2048, marks=pytest.mark.slow),
        pytest.param("mxfp8_bf16", 1024, 2048, marks=pytest.mark.slow),
        pytest.param("fp8_e4m3fn_bf16_block_scale", 1024, 2048, marks=pytest.mark.slow),
    ],
)
def test_peak_is_the_model_and_a_matrix(tmp_path, code, hidden, intermediate):
    stored = write_mixtral(tmp_path / "model", hidden, intermediate)
    matrix = 2 * hidden * intermediate
    assert stored > 100 * 2**20
    size, growth = measure(LOAD.format(code=code), tmp_path / "model", SMALL)
    # A matrix in 16 bits, and in 32 while it is quantized. The mapped file would be 100 MB or more.
    assert size < growth < size + 5 * matrix + COMPILING


@pytest.mark.slow
def test_peak_of_gpt_oss_is_its_size_in_mxfp8(tmp_path):
    """And a shard: no file is whole in memory, and no expert in 16 bits."""
    stored = write_gpt_oss(tmp_path / "model", 1024, 2048, layers=4)
    shard = 2**26
    assert stored > shard
    size, growth = measure(LOAD.format(code=None), tmp_path / "model", SMALL.with_name("gpt_oss_mxfp4"))
    assert size < growth < size + shard
