"""`fp8x.nn.Linear` against float64, for every recipe."""

import re

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from flax import nnx
from metric import assert_close, float64
from shapes import quantize, quantize_with_scale

import fp8x
from fp8x.errors import CalibrationError, RecipeError, ShapeError

CODES = [code for code in fp8x.RECIPES if "_f32" not in code]
OUT = {"bf16": jnp.bfloat16, "_f16": jnp.float16, "_f32": jnp.float32}
ROWS = (1, 65, 0, 64, 63)
FAMILIES = ["e4m3_e4m3_bf16", "e4m3_e4m3_f16_dynamic", "e4m3_bf16", "fp8_e4m3fn_f16_block_scale", "mxfp8_mxfp8_bf16"]
K, N = 160, 72  # 128 divides neither
forward = nnx.jit(lambda layer, x: layer(x))


def inputs(rows, dtype=jnp.bfloat16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, K)), dtype)


def layer_of(code, use_bias=True) -> fp8x.nn.Linear:
    """A layer with a random bias, and with a static scale that covers `inputs`, where it has one."""
    layer = fp8x.nn.Linear(K, N, recipe=code, use_bias=use_bias, rngs=nnx.Rngs(0))
    if use_bias:
        layer.bias[...] = jax.random.normal(jax.random.key(1), (N,), layer.recipe.out_dtype)
    if layer.recipe.is_static and not layer.is_calibrating:
        layer.input_scale[...] = quantize(inputs(65), layer.recipe.activation).scale
    return layer


def expected(layer, x) -> np.ndarray:
    """The product in float64, of what the recipe says is multiplied."""
    activation = layer.recipe.activation
    if activation is not None:
        is_given = layer.recipe.is_static and not layer.is_calibrating
        x = quantize_with_scale(x, layer.input_scale[...], activation) if is_given else quantize(x, activation)
    return metric.matmul(x, layer.quantized_weight, None if layer.bias is None else layer.bias[...])


@pytest.mark.sample
@pytest.mark.parametrize(("index", "code"), list(enumerate([*CODES, "e4m3_e4m3_f32_dynamic"])), ids=str)
def test_every_recipe_in_jit(index, code):
    layer = layer_of(code, use_bias=index % 2 == 0)
    x = inputs(ROWS[index % len(ROWS)], layer.recipe.out_dtype)
    truth = expected(layer, x)
    y = forward(layer, x)
    assert y.dtype == layer.recipe.out_dtype == next(OUT[out] for out in OUT if out in code)
    assert_close(y, truth)


@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows(rows):
    layer, x = layer_of("e4m3_e4m3_bf16"), inputs(rows)
    assert_close(layer(x), expected(layer, x))
    assert_close(forward(layer, x), expected(layer, x))


@pytest.mark.parametrize("code", FAMILIES)
def test_a_row_alone_is_the_row_in_a_batch(code):
    """The quantized inputs are the same bit for bit; a dot product of one row may sum in another order, which can move
    the result by one rounding to the output type."""
    layer, x = layer_of(code), inputs(65)
    for row in (0, 64):
        assert_close(layer(x[row]), float64(layer(x)[row]))
        assert layer(x[row]).shape == (N,)


@pytest.mark.parametrize("code", FAMILIES)
def test_bias_is_added_at_any_batch_size(code):
    layer = layer_of(code)
    for rows in (1, 5):
        y = layer(jnp.zeros((rows, K), jnp.bfloat16))
        np.testing.assert_array_equal(y, jnp.broadcast_to(layer.bias[...], (rows, N)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_input_of_any_type(dtype):
    layer = layer_of("e4m3_e4m3_bf16_dynamic")
    assert layer(inputs(3, dtype)).dtype == jnp.bfloat16


def test_leading_dims_and_vmap():
    layer, x = layer_of("mxfp8_mxfp8_bf16"), inputs(6)
    y = float64(layer(x))
    assert_close(layer(x.reshape(2, 3, K)), y.reshape(2, 3, N))
    assert_close(jax.vmap(layer)(x.reshape(2, 3, K)), y.reshape(2, 3, N))
    assert_close(jax.vmap(layer)(x), y)
    assert layer(jnp.zeros((2, 0, K))).shape == (2, 0, N)


class TestFromLinear:
    def test_transposes_and_keeps_the_bias(self):
        source = nnx.Linear(K, N, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal())
        layer = fp8x.nn.Linear.from_linear(source, "mxfp8_bf16")
        q = quantize(source.kernel[...].T, layer.recipe.weight)
        np.testing.assert_array_equal(metric.as_bits(layer.weight[...]), metric.as_bits(q.data))
        np.testing.assert_array_equal(metric.as_bits(layer.weight_scale[...]), metric.as_bits(q.scale))
        np.testing.assert_array_equal(layer.bias[...], source.bias[...])
        assert_close(layer(inputs(4)), source(inputs(4)), tolerance=0.04)

    def test_without_bias(self):
        assert fp8x.nn.Linear.from_linear(nnx.Linear(K, N, use_bias=False, rngs=nnx.Rngs(0)), "e4m3_bf16").bias is None

    def test_errors_name_the_path(self):
        source = nnx.Linear(48, N, rngs=nnx.Rngs(0))
        with pytest.raises(ShapeError, match=r"layers\.3: dim 1 .* is 48, which 32 does not divide.*pad the dim to 64"):
            fp8x.nn.Linear.from_linear(source, "mxfp8_bf16", name="layers.3")
        source.kernel[...] = source.kernel[...].at[0, 0].set(jnp.nan)
        with pytest.raises(ShapeError, match=r"layers\.3: holds 1 NaN or Inf of 3456 values"):
            fp8x.nn.Linear.from_linear(source, "e4m3_bf16", name="layers.3")
        assert fp8x.nn.Linear.from_linear(source, "e4m3_bf16", allow_nonfinite=True)

    def test_kernels_of_other_shapes(self):
        source = nnx.Linear(K, N, rngs=nnx.Rngs(0))
        for shape in ((K,), (3, N, K)):
            source.kernel.set_value(jnp.zeros(shape))
            text = f"kernel: shape is {shape}; use a kernel (160, 72), or a stack of these along leading axes"
            with pytest.raises(ShapeError, match=re.escape(text)):
                fp8x.nn.Linear.from_linear(source, "e4m3_bf16")


class TestFromArrays:
    SCHEME = fp8x.recipe("e4m3_e4m3_bf16").weight
    WEIGHT = fp8x.ScaledArray(np.full((N, K), 448, SCHEME.dtype), np.full((1, 1), 1 / 448, "f4"), SCHEME)  # ones

    def test_holds_what_it_is_given(self):
        scale = jnp.full((1, 1), 0.5)
        layer = fp8x.nn.Linear.from_arrays(self.WEIGHT, "e4m3_e4m3_bf16", bias=jnp.ones(N), input_scale=scale)
        assert layer.quantized_weight.scheme == self.WEIGHT.scheme
        np.testing.assert_array_equal(layer.input_scale[...], scale)
        np.testing.assert_array_equal(layer(jnp.ones((1, K))), np.full((1, N), K + 1))

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            (dict(bias=np.ones(N + 1, "f4")), ShapeError, r"weight \(72, 160\) and bias \(73,\) do not fit"),
            (dict(input_scale=np.ones((), "f4")), ShapeError, r"input_scale: float32\[\] does not .* float32\[1, 1\]"),
            (dict(input_scale=np.ones((1, 1), jnp.bfloat16)), ShapeError, "input_scale: bfloat16"),
            (dict(recipe="mxfp8_bf16"), RecipeError, "weight: it is stored in e4m3 ·×· f32, but .* e4m3 1×32 e8m0"),
            (dict(recipe="e5m2_e5m2_bf16"), RecipeError, "weight: it is stored in e4m3"),
        ],
    )
    def test_refuses_what_does_not_fit(self, options, error, match):
        with pytest.raises(error, match=match):
            fp8x.nn.Linear.from_arrays(self.WEIGHT, **(dict(recipe="e4m3_e4m3_bf16") | options))


class TestStaticScale:
    def test_unit_scales_need_no_calibration(self):
        layer = layer_of("e5m2_e5m2_bf16")
        np.testing.assert_array_equal(layer.weight_scale[...], [[1]])
        np.testing.assert_array_equal(layer.input_scale[...], [[1]])
        assert np.isfinite(float64(layer(inputs(2)))).all()

    @pytest.mark.sample
    @pytest.mark.parametrize("code", [code for code in CODES if "bf16" in code and code.endswith("_max_calibrate")])
    def test_calibration_is_inference_with_the_running_scale(self, code):
        layer = layer_of(code)
        layer(inputs(9))
        observed = layer(3 * inputs(5, seed=1))
        assert layer.tokens[...] == 14
        layer.finish_calibration()
        assert layer.recipe == fp8x.recipe(code.removesuffix("_max_calibrate"))
        np.testing.assert_array_equal(layer(3 * inputs(5, seed=1)), observed)

    def test_the_amax_is_a_running_one_also_in_jit(self):
        layer = layer_of("e4m3_e4m3_bf16_max_calibrate")
        x = inputs(4, jnp.float32)
        for factor in (1.0, 5.0, 2.0):
            forward(layer, factor * x)
        np.testing.assert_array_equal(layer.amax[...], [[np.abs(5 * x).max()]])

    def test_values_over_the_scale_saturate(self):
        layer = layer_of("e4m3_e4m3_bf16", use_bias=False)
        limit = 448 * layer.input_scale[0, 0]
        x = jnp.full((1, K), limit)
        np.testing.assert_array_equal(layer(100 * x), layer(x))


def test_what_a_layer_does_not_take():
    layer = layer_of("e4m3_bf16")
    with pytest.raises(ShapeError, match=r"x: shape is \(2, 64\), but the layer takes \[\.\.\., 160\]"):
        layer(jnp.zeros((2, 64)))
    with pytest.raises(ShapeError, match="x: dtype is int32"):
        layer(jnp.zeros((2, K), jnp.int32))
    with pytest.raises(CalibrationError, match="only a static one is calibrated"):
        layer.start_calibration()
    with pytest.raises(ShapeError, match=r"weight: dim 1 .* is 40"):
        fp8x.nn.Linear(40, 8, recipe="mxfp8_bf16", rngs=nnx.Rngs(0))


def test_a_new_layer_is_random_with_variance_one_over_k():
    layer = fp8x.nn.Linear(512, 256, recipe="e4m3_bf16", rngs=nnx.Rngs(0))
    assert abs(float64(layer.quantized_weight).std() * 512**0.5 - 1) < 0.02
    assert layer.bias[...].dtype == jnp.bfloat16 and not layer.bias[...].any()


X64 = np.random.default_rng(7).normal(size=(5, K))


@pytest.mark.parametrize("x", [X64, X64.tolist(), X64[0].tolist()], ids=["float64", "lists", "a list"])
def test_takes_what_nnx_linear_takes(x):
    layer = layer_of("e4m3_e4m3_bf16_dynamic")
    assert nnx.Linear(K, N, rngs=nnx.Rngs(0))(x).shape == layer(x).shape
    np.testing.assert_array_equal(layer(x), layer(jnp.asarray(np.float32(x))))
