"""Checkpoints in the dialects of others (`tests/goldens/make_{fp8,dialect,mxfp4}_goldens.py`): what they mean, and that
it survives."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import fp8x
from fp8x.checkpoint import FORMATS, Reader, format_of
from fp8x.checkpoint.inspect import inspect
from fp8x.models import Decoder
from fp8x.models.convert import convert
from fp8x.models.hf_names import linear_names, param_names
from fp8x.models.loading import get
from fp8x.nn.quantized import QuantizedLayer
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme, mx, per_row, per_tensor

GOLDENS = Path(__file__).parents[1] / "goldens" / "fp8"

SMALL_BLOCK, RAGGED = Scheme("e4m3", block=(32, 32)), Scheme("e4m3", block=(48, 40))
POW2 = dataclasses.replace(SMALL_BLOCK, scale_rule="pow2")
# The recipe of the first q_proj and of the last MLP; None where they are in 16 bits.
TENSOR = Recipe(per_tensor(), per_tensor(), "static")
STATIC_BLOCK = Recipe(SMALL_BLOCK, per_tensor(), "static")
MX = Recipe(mx(), mx(), "dynamic")
CHANNEL = Recipe(per_row(), per_row(), "dynamic")
MX_FLOOR = dataclasses.replace(mx(), scale_rule="floor")

# FBGEMM's bound of activations, and activations in 4 bits, which fp8x says it has not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*activation_scale_ub is 1200.0:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*activations in 4 bits there:UserWarning"),
]


def block(scheme: Scheme) -> Recipe:
    return Recipe(scheme, dataclasses.replace(scheme, block=(1, scheme.block[1])), "dynamic")


CASES = {
    "hf_bf16_fused": (None, None, None),
    "hf_block": ("fp8", block(SMALL_BLOCK), block(SMALL_BLOCK)),
    "hf_block_fused_ue8m0": ("fp8", block(POW2), block(POW2)),
    "hf_block_static": ("fp8", STATIC_BLOCK, STATIC_BLOCK),
    "hf_tensor_fused_static": ("fp8", TENSOR, TENSOR),
    "fp8_tensor": ("fp8", TENSOR, TENSOR),
    "fp8_block_ragged": ("fp8", None, block(RAGGED)),
    "mxfp8": ("mxfp8", MX, MX),
    "modelopt_fp8": ("modelopt", TENSOR, TENSOR),
    "modelopt_mxfp8": ("modelopt", None, MX),
    "modelopt_mixed": ("modelopt", CHANNEL, MX),
    "compressed_tensors_mxfp8": ("compressed-tensors", Recipe(mx()), Recipe(mx())),
    "compressed_tensors_channel": ("compressed-tensors", CHANNEL, CHANNEL),
    "fbgemm_fp8": ("fbgemm_fp8", None, CHANNEL),
    "quark_fp8_kv": ("quark", TENSOR, TENSOR),
    "quark_per_channel": ("quark", CHANNEL, (CHANNEL, Recipe(per_row()))),
    "quark_mxfp8": ("quark", Recipe(MX_FLOOR, MX_FLOOR, "dynamic"), Recipe(MX_FLOOR, MX_FLOOR, "dynamic")),
    "compressed_tensors_mxfp4": ("compressed-tensors", Recipe(mx()), Recipe(mx())),
    "compressed_tensors_mxfp4_w4a4": ("compressed-tensors", MX, MX),
    "fp8_fp4_experts": ("fp8", block(POW2), MX),
    "quark_mxfp4": ("quark", Recipe(MX_FLOOR, MX_FLOOR, "dynamic"), Recipe(MX_FLOOR, MX_FLOOR, "dynamic")),
    "torchao_row": ("torchao", CHANNEL, CHANNEL),
    "torchao_mixed": ("torchao", Recipe(per_tensor(), per_tensor(), "dynamic"), Recipe(per_row())),
    "torchao_mxfp8": ("torchao", MX, MX),
}


@functools.cache
def loaded(name: str) -> Decoder:
    return fp8x.load(GOLDENS / name)


def dequantized(model: Decoder) -> Decoder:
    """The same weights in float32."""
    config = dataclasses.replace(model.config, dtype="float32")
    plain = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    for path in param_names(model.config):
        get(plain, path).set_value(get(model, path)[...].astype(jnp.float32))
    for path in linear_names(model.config):
        layer, target = get(model, path), get(plain, path)
        if isinstance(target, nnx.Linear):
            weight = layer.quantized_weight.dequantize() if isinstance(layer, QuantizedLayer) else layer.kernel[...].T
            target.kernel.set_value(weight.T.astype(jnp.float32))
        else:
            weight = layer.quantized_weight.dequantize() if isinstance(layer, QuantizedLayer) else layer.weight[...]
            target.weight.set_value(weight.astype(jnp.float32))
    return plain


run = nnx.jit(lambda model, ids: model(ids))


def test_no_golden_is_forgotten():
    assert {path.name for path in GOLDENS.iterdir()} == set(CASES)


@pytest.mark.sample
@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_dequantized_weights(name):
    format, attention, mlp = CASES[name]
    first, last = mlp if isinstance(mlp, tuple) else (mlp, mlp)
    model, golden = loaded(name), load_file(GOLDENS / name / "golden.safetensors")
    found = format_of(Reader(GOLDENS / name).config)
    assert (None if found is None else found.name) == format
    assert getattr(model.layers[0].self_attn.q_proj, "recipe", None) == attention
    found = model.layers[-1].mlp
    for layer, recipe in (
        zip((found.w13, found.w2), (first, last))
        if hasattr(found, "w13")
        else zip((found.gate_proj, found.up_proj, found.down_proj), (first, first, last))
    ):
        assert getattr(layer, "recipe", None) == recipe
    logits = run(dequantized(model), golden["ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-6 * np.abs(golden["logits"]).max())


@pytest.mark.parametrize(
    "name", ["hf_bf16_fused", "hf_block", "modelopt_mixed", "fbgemm_fp8", "quark_mxfp8", "torchao_mxfp8"]
)
def test_converted_to_float32(tmp_path, name):
    """Without a model, and written with the names of the published checkpoints."""
    convert(GOLDENS / name, tmp_path / "out", "f32")
    golden = load_file(GOLDENS / name / "golden.safetensors")
    logits = run(fp8x.load(tmp_path / "out"), golden["ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-6 * np.abs(golden["logits"]).max())


def test_static_scales():
    """One for each layer: that of all experts, of gate and up, is the largest, which clips none."""
    for name, *expected in (
        ("fp8_tensor", 0.078125, 0.109375, 0.046875),
        ("modelopt_fp8", 0.008265904, 0.0126953125, 0.025111606),
        ("hf_block_static", 0.08, 0.6, 0.65),
        ("hf_tensor_fused_static", 0.08, 0.6, 0.65),
    ):
        layer = get(loaded(name), f"layers.{loaded(name).config.num_hidden_layers - 1}")
        found = [layer.self_attn.q_proj.input_scale, layer.mlp.w13.input_scale, layer.mlp.w2.input_scale]
        np.testing.assert_allclose(np.stack([scale[...] for scale in found]).ravel(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name, (format, *_) in CASES.items() if format])
def test_round_trip_byte_by_byte(tmp_path, name):
    """In its own format, or, where that can't be written, in the first that holds it."""
    model = loaded(name)
    used = {
        layer.recipe for path in linear_names(model.config) if isinstance(layer := get(model, path), QuantizedLayer)
    }
    own = FORMATS[CASES[name][0]]
    format = next(format for format in (own, *FORMATS.values()) if format.objection(used) is None)
    fp8x.save(model, tmp_path / "out", format.name)
    assert_same(fp8x.load(tmp_path / "out"), model)
    assert inspect(tmp_path / "out").format == format.name


def assert_same(a: Decoder, b: Decoder) -> None:
    a_leaves, b_leaves = (dict(jax.tree.leaves_with_path(nnx.state(model))) for model in (a, b))
    assert a_leaves.keys() == b_leaves.keys()
    for key, leaf in a_leaves.items():
        assert (
            leaf.dtype == b_leaves[key].dtype and np.asarray(leaf).tobytes() == np.asarray(b_leaves[key]).tobytes()
        ), key
    for path in linear_names(a.config):
        assert getattr(get(a, path), "recipe", None) == getattr(get(b, path), "recipe", None), path
