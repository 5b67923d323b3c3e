"""The examples run, and do what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    "name, third, limit",
    [
        ("linen_bridge", "e4m3_e4m3_bf16", 0.06),
        ("quantize_flax_model", "e4m3_e4m3_bf16", 0.06),
        ("quantize_linen_model", "fp8_e4m3fn_bf16_block_scale", 0.1),  # eighteen products, one after another
    ],
)
def test_every_recipe_stays_near_the_dense_model(name, third, limit):
    errors = runpy.run_path(EXAMPLES / f"{name}.py")["main"]()
    assert set(errors) == {"mxfp8_mxfp8_bf16", "e4m3_bf16", third}
    assert all(0 < error < limit for error in errors.values()), errors
