"""The examples run, and do what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["linen_bridge", "quantize_flax_model"])
def test_every_recipe_stays_near_the_dense_model(name):
    errors = runpy.run_path(EXAMPLES / f"{name}.py")["main"]()
    assert set(errors) == {"mxfp8_mxfp8_bf16", "e4m3_bf16", "e4m3_e4m3_bf16"}
    assert all(0 < error < 0.06 for error in errors.values()), errors
