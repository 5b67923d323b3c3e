"""Meshes, and tiny models on and off them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import fp8x
from fp8x.models import Decoder, DecoderConfig
from fp8x.nn.walk import named_layers

CODES = [code for code, recipe in fp8x.RECIPES.items() if recipe.observer is None and "_f32" not in code]

# Four heads of 16, 96 features of an expert: over two or four devices, boundaries cut blocks of 32 and of 128.
TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 61,
    "hidden_size": 64,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "dtype": "float32",
}
IDS = np.random.default_rng(0).integers(0, 61, (4, 5))


def mesh_of(axis_type=AxisType.Auto, **axes):
    shape = tuple(axes.values())
    return jax.make_mesh(shape, tuple(axes), (axis_type,) * len(axes), devices=devices(math.prod(shape)))


def devices(count: int) -> list[jax.Device]:
    """So many of those that are here; a machine with fewer, of one GPU say, skips the test."""
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices; here are {jax.device_count()}")
    return jax.devices()[:count]


def tiny(code: str | None, dtype=jnp.float32, **config) -> Decoder:
    """A random decoder of float32 parameters whose quantized layers return `dtype`.

    In float32, devices and one device differ by the order of float32 sums alone; a bfloat16 output here and there moves
    a code of the next layer's input.
    """
    model = Decoder(DecoderConfig.from_hf(TINY | config), rngs=nnx.Rngs(0))
    if code is not None:
        fp8x.quantize_model(model, dataclasses.replace(fp8x.recipe(code), out_dtype=dtype))
    for number, layer in enumerate(named_layers(model).values()):
        if layer.recipe.is_static and layer.recipe.activation.scale_rule != "unit":
            shape = layer.input_scale.shape
            layer.input_scale[...] = 0.01 + 0.001 * (jnp.arange(shape[1], dtype=jnp.float32) + number)[None]
    return model


@nnx.jit
def run(model: Decoder, ids):
    """The logits, by one compiled function for all tests."""
    return model(ids)
