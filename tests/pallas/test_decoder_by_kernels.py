"""A trained model from its checkpoint to logits, every product by our kernels in the interpreter, beside XLA."""

import json
import subprocess
import sys

import pytest

MODEL = """
import json, sys
import jax
# An operation that is dispatched while a kernel is interpreted may wait for it forever, and it for the operation.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
import fp8x

recipe, tokens = sys.argv[1], int(sys.argv[2])
model = fp8x.load("examples/tiny_mixtral", recipe)
ids = jnp.asarray(np.random.default_rng(0).integers(1, 2048, (1, tokens)))
expected = np.asarray(model(ids))
with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)), fp8x.backend("mosaic_gpu"):
    kernels = {choice.kernel for choice in fp8x.ops.explain(model, ids)}
    logits = np.asarray(model(ids))
print(json.dumps({
    "kernels": sorted(kernels),
    "error": float(np.linalg.norm(logits - expected) / np.linalg.norm(expected)),
    "races": gpu_callbacks._races.races_found,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [20, 1])
@pytest.mark.parametrize(
    "recipe",
    [
        "e4m3_e4m3_bf16_dynamic",
        "fp8_e4m3fn_bf16_block_scale",
        "e4m3_bf16",
        "mxfp8_bf16",
        "mxfp8_mxfp8_bf16",
        "e5m2_e5m2_f16",
    ],
)
def test_logits(recipe, tokens):
    child = subprocess.run(
        [sys.executable, "-c", MODEL, recipe, str(tokens)], capture_output=True, text=True, timeout=900
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    products = {name for name in found["kernels"] if name not in ("in_two_steps", "sm90_quantize", "xla_quantize")}
    assert products and all(name.startswith("sm90") for name in products), found
    # Products that round another way move codes of the next layer's input.
    assert found["error"] < 0.02 and not found["races"], found
