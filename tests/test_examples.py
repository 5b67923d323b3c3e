"""The examples run, and do what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.sample
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


def test_training_in_8_bits_learns_what_float32_does():
    losses = runpy.run_path(EXAMPLES / "train_qat.py")["main"](steps=60)
    assert set(losses) == {"float32", "float32, then quantized", "trained in 8 bits"}
    assert max(losses.values()) < 5 and max(losses.values()) - min(losses.values()) < 0.1, losses


@pytest.mark.slow
def test_adapters_learn_beside_a_quantized_base_what_they_do_beside_bf16():
    results = runpy.run_path(EXAMPLES / "train_lora.py")["main"](steps=12)
    plain, quantized = results["bf16"], results["mxfp8_bf16"]
    for first, last, _ in results.values():
        assert last < first - 0.1, results
    assert abs(plain[1] - quantized[1]) < 0.02 and quantized[2] < 0.6 * plain[2], results
