"""`fp8x.nn.GroupedLinear` against float64, for every recipe."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from flax import nnx
from metric import as_bits, assert_close, float64
from shapes import GROUPED, Shape, operands, quantize, quantize_with_scale, quantized_zeros

import fp8x
from fp8x.errors import CalibrationError, RecipeError, ShapeError
from fp8x.nn.unquantized import UnquantizedGroupedLinear
from fp8x.ops.gated import merge_rows
from fp8x.ops.groups import row_mask
from fp8x.scheme import Scheme, per_tensor

CODES = [code for code in fp8x.RECIPES if "_f32" not in code]
forward = nnx.jit(lambda layer, x, sizes: layer(x, sizes))
MIXED = Shape((1, 63, 0, 64, 65), 96, 160, spare=3)
HOT = Shape((0, 0, 130, 0, 0), 96, 160)
NO_ROWS = Shape((0, 0, 0, 0, 0), 96, 160)


def source_of(shape, *, parts=None, use_bias=True) -> UnquantizedGroupedLinear:
    """A layer with random weights from numpy: XLA takes long to compile a truncated normal."""
    n = shape.n if parts is None else (parts, shape.n)
    make = functools.partial(UnquantizedGroupedLinear, len(shape.group_sizes), shape.k, n, use_bias=use_bias)
    source, rng = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), np.random.default_rng(0)
    weight = rng.normal(size=source.weight.shape) * shape.k**-0.5
    if parts:  # matrices of very different magnitude show whose scale is whose
        weight *= 100.0 ** np.arange(parts)[:, None, None]
    source.weight.set_value(jnp.asarray(weight, jnp.float32))
    if use_bias:
        source.bias.set_value(jnp.asarray(rng.normal(size=source.bias.shape), jnp.float32))
    return source


def layer_of(shape, code, *, parts=None, use_bias=True) -> fp8x.nn.GroupedLinear:
    """A layer `[E, N, K]` (or `[E, parts, N, K]`), with a static scale where it has one."""
    layer = fp8x.nn.GroupedLinear.from_unquantized(source_of(shape, parts=parts, use_bias=use_bias), code)
    if layer.recipe.is_static and not layer.is_calibrating and layer.recipe.activation.scale_rule != "unit":
        layer.input_scale[...] = jnp.full_like(layer.input_scale[...], 0.05)
    return layer


def inputs(shape, dtype=jnp.bfloat16):
    given = operands(shape, Scheme("e4m3", block=(None, None)), dtype=dtype)
    return given.x, given.group_sizes


def expected(layer, x, sizes) -> np.ndarray:
    """The product in float64, of what the recipe says is multiplied."""
    activation = layer.recipe.activation
    if activation is not None:
        x = jnp.where(row_mask(sizes, x.shape[0])[:, None], x, 0)
        is_given = layer.recipe.is_static and not layer.is_calibrating
        x = quantize_with_scale(x, layer.input_scale[...], activation) if is_given else quantize(x, activation)
    bias = None if layer.bias is None else layer.bias[...]
    return metric.grouped_matmul(x, layer.quantized_weight, sizes.tolist(), bias)


@pytest.mark.sample
@pytest.mark.parametrize(
    ("index", "code"),
    # Those with float16 differ from bfloat16's in that alone.
    [pytest.param(*case, marks=pytest.mark.slow if "_f16" in case[1] else ()) for case in enumerate(CODES)],
    ids=str,
)
def test_every_recipe_in_jit(index, code):
    recipe = fp8x.recipe(code)
    shape = (MIXED, HOT, NO_ROWS)[index % 5 % 3]
    layer = layer_of(shape, code, parts=2 if index % 3 else None, use_bias=index % 2 == 0)
    x, sizes = inputs(shape, recipe.out_dtype)
    truth = expected(layer, x, sizes)
    y = forward(layer, x, sizes)
    assert y.dtype == recipe.out_dtype and y.shape == (shape.m, *layer.weight.shape[1:-1])
    assert_close(y, truth)
    assert not np.any(y[shape.m - shape.spare :])


@pytest.mark.sample
@pytest.mark.parametrize("n", [96, 128, 192, 256])
def test_gate_and_up_have_scales_of_their_own(n):
    """Blocks of 128 rows end where a matrix does: 192 have those of 64 when gate and up are merged."""
    shape = Shape((2, 0, 5), n, 160)
    layer = layer_of(shape, "fp8_e4m3fn_bf16_block_scale", parts=2)
    merged = merge_rows(layer.quantized_weight)
    assert merged.scheme.block == (1, {96: 96, 128: 128, 192: 64, 256: 128}[n], 128)
    np.testing.assert_array_equal(float64(merged).reshape(3, 2, n, 160), float64(layer.quantized_weight))
    x, sizes = inputs(shape)
    y = layer(x, sizes)
    truth = expected(layer, x, sizes)
    for part in range(2):  # an error in the small matrix drowns beside the large one
        assert_close(y[:, part], truth[:, part])


@pytest.mark.sample
@pytest.mark.parametrize("block", [(None, None), (1, None), (1, 32), (32, 32), (2, None, 64)], ids=str)
def test_merged_rows_are_the_parts(block):
    shape = Shape((3, 0, 4, 1), 96, 160)
    layer = layer_of(shape, fp8x.Recipe(Scheme("e4m3", block=block)), parts=2)
    merged = merge_rows(layer.quantized_weight)
    assert merged.shape == (4, 192, 160)
    np.testing.assert_array_equal(float64(merged).reshape(4, 2, 96, 160), float64(layer.quantized_weight))
    x, sizes = inputs(shape)
    truth = expected(layer, x, sizes)
    y = layer(x, sizes)
    for part in range(2):
        assert_close(y[:, part], truth[:, part])


def test_one_scale_across_experts():
    shape = Shape((3, 2), 64, 96)
    recipe = fp8x.Recipe(Scheme("e4m3", block=(None, None, None)))
    layer = layer_of(shape, recipe, parts=2)
    assert layer.weight_scale.shape == (1, 2, 1, 1)
    layer = layer_of(shape, recipe)
    assert layer.weight_scale.shape == (1, 1, 1)
    x, sizes = inputs(shape)
    assert_close(layer(x, sizes), expected(layer, x, sizes))


@pytest.mark.slow
def test_a_row_alone_is_the_row_in_a_batch():
    shape = Shape((1, 63, 65), 72, 160)
    layer = layer_of(shape, "mxfp8_mxfp8_bf16")
    x, sizes = inputs(shape)
    y = layer(x, sizes)
    for row, group in [(0, 0), (63, 1), (128, 2)]:
        alone = layer(x[row : row + 1], jnp.zeros(3, jnp.int32).at[group].set(1))
        assert_close(alone[0], float64(y[row]))


@pytest.mark.sample
@pytest.mark.parametrize("n", [96, 128])
def test_by_expert_is_the_row_of_a_group(n):
    """Parts that merge and parts that do not, in any order; an expert that is not here gives zeros."""
    shape = Shape((1, 0, 2), n, 160)
    layer = layer_of(shape, "fp8_e4m3fn_bf16_block_scale", parts=2)
    x, sizes = inputs(shape)
    y = layer.by_expert(x[::-1], jnp.asarray([2, 3, 0]))
    assert_close(y[::2], float64(layer(x, sizes)[::-2]))
    assert not np.any(y[1])


def test_rows_in_another_order():
    """Blocks of one row are quantized before they are taken; one scale for all rows, after."""
    shape = Shape((2, 0, 3), 96, 160)
    rows = jnp.asarray([1, 1, 0, 2, 1])
    for code in ("mxfp8_mxfp8_bf16", fp8x.Recipe(per_tensor(), per_tensor(), "dynamic")):
        layer = layer_of(shape, code)
        x, sizes = inputs(shape)
        np.testing.assert_array_equal(layer(x, sizes, rows), layer(x[rows], sizes))


@pytest.mark.slow
@pytest.mark.parametrize("code", ["mxfp8_mxfp8_bf16", "fp8_e4m3fn_bf16_block_scale_static_activation"])
def test_with_a_gate_before_another(code):
    """The two layers' bits, with 8 bits between them."""
    shape, rows = Shape((2, 0, 3), 96, 160), jnp.asarray([1, 1, 0, 2, 1])
    w13, w2 = layer_of(shape, code, parts=2), layer_of(Shape(shape.group_sizes, 72, 96), code)
    x, sizes = inputs(shape)
    y = w13.with_gate(w2, x, sizes, rows, "silu")
    assert y.shape == (5, 72)
    np.testing.assert_array_equal(y, w2(w13(x, sizes, rows), sizes, gate="silu"))


@pytest.mark.slow
def test_vmap():
    shape = Shape((2, 0, 3), 32, 64)
    layer = layer_of(shape, "e4m3_e4m3_bf16_dynamic", parts=2)
    x, sizes = inputs(shape)
    y = jax.vmap(layer)(jnp.stack([x, -x]), jnp.stack([sizes, sizes[::-1]]))
    assert_close(y[0], float64(layer(x, sizes)))
    assert_close(y[1], float64(layer(-x, sizes[::-1])))


class TestCalibration:
    CODE = "fp8_e4m3fn_bf16_block_scale_static_activation_max_calibrate"

    def test_is_inference_with_the_running_scale(self):
        layer = layer_of(MIXED, self.CODE, parts=2)
        x, sizes = inputs(MIXED)
        observed = forward(layer, x, sizes)
        layer.finish_calibration()
        np.testing.assert_array_equal(forward(layer, x, sizes), observed)

    def test_rows_past_the_groups_enter_no_amax_and_tokens_are_counted_by_expert(self):
        layer = layer_of(MIXED, self.CODE)
        x, sizes = inputs(MIXED, jnp.float32)
        layer(x.at[-1].set(1e6), sizes)
        rows = np.abs(x[: -MIXED.spare])
        np.testing.assert_array_equal(layer.amax[...], [[rows[:, :128].max(), rows[:, 128:].max()]])
        layer(x[:4], jnp.asarray([0, 0, 4, 0, 0]))
        assert layer.tokens[...].tolist() == [1, 63, 4, 64, 65]

    def test_takes_rows_by_group(self):
        layer = layer_of(MIXED, self.CODE)
        with pytest.raises(CalibrationError, match="it is in calibration, which takes sorted rows; call it with group"):
            layer.by_expert(jnp.ones((1, MIXED.k)), jnp.zeros(1, jnp.int32))

    def test_uncalibrated(self):
        shape = Shape((2, 1), 32, 64)
        layer = fp8x.nn.GroupedLinear(2, 64, 32, recipe="e4m3_e4m3_bf16", rngs=nnx.Rngs(0))
        x, sizes = inputs(shape)
        with pytest.raises(CalibrationError, match=r"the layer \[64 -> 32\] is not calibrated"):
            layer(x, sizes)


class TestFromUnquantized:
    def test_every_expert_is_quantized_by_itself(self):
        source = source_of(Shape((0, 0, 0), 72, 160), parts=2)
        layer = fp8x.nn.GroupedLinear.from_unquantized(source, "e4m3_e4m3_bf16")
        for index in np.ndindex(3, 2):
            q = quantize(source.weight[index], layer.recipe.weight)
            np.testing.assert_array_equal(as_bits(layer.weight[index]), as_bits(q.data))
            np.testing.assert_array_equal(layer.weight_scale[index], q.scale)
        np.testing.assert_array_equal(layer.bias[...], source.bias[...])

    def test_errors_name_the_path(self):
        source = source_of(Shape((0, 0), 8, 48))
        with pytest.raises(ShapeError, match=r"mlp\.w2: dim 2 of shape \(2, 8, 48\) is 48, which 32 does not divide"):
            fp8x.nn.GroupedLinear.from_unquantized(source, "mxfp8_bf16", name="mlp.w2")
        source.weight[...] = source.weight[...].at[1, 2, 3].set(jnp.inf)
        with pytest.raises(ShapeError, match=r"mlp\.w2: holds 1 NaN or Inf"):
            fp8x.nn.GroupedLinear.from_unquantized(source, "e4m3_bf16", name="mlp.w2")


def test_unquantized_layer_is_the_product_in_float64():
    for shape in (GROUPED[2], GROUPED[6]):
        source = source_of(shape)
        x, sizes = inputs(shape, jnp.float32)
        x = jnp.nan_to_num(x)
        y = source(x, sizes)
        assert_close(y, metric.grouped_matmul(x, source.weight[...], shape.group_sizes, source.bias[...]))


WEIGHT = quantized_zeros((2, 8, 64), Scheme("e4m3", block=(None, None)))


@pytest.mark.parametrize(
    ("weight", "options", "error", "match"),
    [
        (WEIGHT, dict(bias=np.ones((2, 7), "f4")), ShapeError, r"weight \(2, 8, 64\) and bias \(2, 7\) do not fit"),
        (quantized_zeros((8, 64), WEIGHT.scheme), {}, ShapeError, r"use \[E, N, K\] and \[E, N\]"),
        (WEIGHT, dict(recipe="e4m3_bf16"), RecipeError, "it is stored in e4m3 ·×· f32, but the recipe's"),
        (WEIGHT, dict(input_scale=np.ones((2, 1), "f4")), ShapeError, r"input_scale: float32\[2, 1\] does not fit"),
    ],
)
def test_from_arrays_refuses_what_does_not_fit(weight, options, error, match):
    with pytest.raises(error, match=match):
        fp8x.nn.GroupedLinear.from_arrays(weight, **(dict(recipe="e4m3_e4m3_bf16") | options))


def test_what_a_layer_does_not_take():
    layer = fp8x.nn.GroupedLinear(2, 64, 32, recipe="e4m3_e4m3_bf16_max_calibrate", rngs=nnx.Rngs(0))
    with pytest.raises(ShapeError, match=r"x: shape is \(3, 32\), but the layer takes \[M, 64\]"):
        layer(jnp.ones((3, 32)), jnp.asarray([1, 2]))
    with pytest.raises(ShapeError, match=r"group_sizes: shape is \(3,\), but the weights hold 2 experts"):
        layer(jnp.ones((3, 64)), jnp.asarray([1, 1, 1]))
    assert not layer.tokens[...].any()
    other = dataclasses.replace(layer.recipe, weight=Scheme("e4m3", block=(1, 32)))
    assert fp8x.nn.GroupedLinear(2, 40, 8, recipe=other, rngs=nnx.Rngs(0)).weight_scale.shape == (2, 8, 2)
