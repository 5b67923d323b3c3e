"""`ops.matmul` against float64, and its gradient."""

import math

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from metric import TOLERANCE, assert_close, float64, on_tensor_cores, relative_error
from shapes import DENSE, fits, operands, quantize, quantize_with_scale, quantized_zeros

import fp8x
from fp8x import ops
from fp8x.errors import ShapeError
from fp8x.ops import reference
from fp8x.scheme import Scheme, mx, per_row, per_tensor

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
# What the recipes multiply, and mixes of element types and scale rules.
PAIRS = [
    *dict.fromkeys((recipe.weight, recipe.activation) for recipe in fp8x.RECIPES.values()),
    (Scheme("e4m3", block=(128, 128), scale_rule="pow2"), Scheme("e5m2", block=(1, 128))),
    (Scheme("e5m2", block=(64, 32)), per_tensor("e4m3")),
]
CASES = [
    pytest.param(shape, *pair, DTYPES[(i + j) % 3], (i // 2 + j) % 2 == 0, id=f"{shape}-{pair[0]} by {pair[1]}")
    for i, shape in enumerate(DENSE)
    for j, pair in enumerate(PAIRS)
    if fits(shape, *pair)
]


def dense_operands(shape, scheme, dtype=jnp.bfloat16):
    """`x [M, K]`, `w [N, K]`, `bias [N]`."""
    given = operands(shape, scheme, dtype=dtype)
    w = fp8x.ScaledArray(given.w.data[0], given.w.scale[0], scheme)
    return given.x, w, given.bias[0]


@pytest.mark.sample
@pytest.mark.parametrize(("shape", "weight", "activation", "dtype", "use_bias"), CASES)
def test_product(shape, weight, activation, dtype, use_bias):
    x, w, bias = dense_operands(shape, weight, dtype)
    bias = bias if use_bias else None
    y = ops.matmul(x, w, activation=activation, bias=bias)
    assert y.dtype == dtype and y.shape == (shape.m, shape.n)
    expected = metric.matmul(x if activation is None else quantize(x, activation), w, bias)
    assert_close(y, expected, short_sums=on_tensor_cores(activation))


def test_reference_meets_the_contract():
    x, w, bias = dense_operands(DENSE[4], per_tensor())
    x = quantize(x, per_tensor())
    assert_close(reference.matmul(x, w, bias, jnp.bfloat16), metric.matmul(x, w, bias))


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_out_dtype(out_dtype):
    x, w, bias = dense_operands(DENSE[4], per_row())
    y = ops.matmul(x, w, bias=bias, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert_close(y, metric.matmul(x, w, bias))


def test_a_long_k_accumulates_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 16384)), jnp.float32)
    w = quantize(jnp.asarray(rng.normal(size=(8, 16384)), jnp.float32), per_row())
    assert_close(ops.matmul(x, w), metric.matmul(x, w))


class TestInput:
    """`x` in its several forms."""

    def test_quantized_before_is_the_same_bit_for_bit(self):
        x, w, bias = dense_operands(DENSE[3], mx())
        expected = ops.matmul(x, w, activation=mx(), bias=bias)
        np.testing.assert_array_equal(ops.matmul(quantize(x, mx()), w, bias=bias), expected)

    @pytest.mark.parametrize("scheme", [per_tensor(), Scheme("e4m3", block=(None, 128)), mx()], ids=str)
    def test_given_scale(self, scheme):
        x, w, _ = dense_operands(DENSE[1], per_row())
        scale = quantize(4 * x, scheme).scale
        expected = ops.matmul(quantize_with_scale(x, scale, scheme), w)
        np.testing.assert_array_equal(ops.matmul(x, w, activation=scheme, activation_scale=scale), expected)

    @pytest.mark.parametrize("lead", [(), (2, 3), (0,), (2, 0, 3)])
    def test_leading_dims(self, lead):
        _, w, bias = dense_operands(DENSE[4], per_row())
        x = jax.random.normal(jax.random.key(0), (*lead, w.shape[1]), jnp.bfloat16)
        y = ops.matmul(x, w, activation=per_row(), bias=bias)
        rows = ops.matmul(x.reshape(math.prod(lead), w.shape[1]), w, activation=per_row(), bias=bias)
        np.testing.assert_array_equal(y, rows.reshape(*lead, w.shape[0]))

    def test_default_output_type_of_a_quantized_x(self):
        x, w, _ = dense_operands(DENSE[1], per_tensor(), jnp.float32)
        assert ops.matmul(quantize(x, per_tensor()), w).dtype == jnp.bfloat16

    def test_nan_stays_in_its_row_and_inf_saturates(self):
        x, w, _ = dense_operands(DENSE[3], per_row(), jnp.float32)
        clean = ops.matmul(x, w, activation=per_row())
        y = ops.matmul(x.at[3, 5].set(np.nan).at[4, 7].set(np.inf), w, activation=per_row())
        assert np.isnan(y[3]).all()
        others = np.delete(np.arange(x.shape[0]), [3, 4])
        np.testing.assert_array_equal(y[others], clean[others])
        row = quantize(x[4:5].at[0, 7].set(0), per_row())
        saturated = float64(row)
        saturated[0, 7] = 448 * float64(row.scale)[0, 0]
        assert_close(y[4:5], metric.matmul(saturated, w), short_sums=on_tensor_cores(per_row()))


def test_vmap_over_rows_and_over_weights():
    x, w, _ = dense_operands(DENSE[2], per_row())
    stacked = jnp.stack([x, 2 * x])
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), w, quantize(w.dequantize()[::-1], per_row()))

    def run(x, w):
        return ops.matmul(x, w, activation=per_row())

    y = jax.vmap(run, in_axes=(0, None))(stacked, w)
    assert_close(y[1], 2 * float64(y[0]))
    y = jax.vmap(run, in_axes=(None, 0))(x, weights)
    assert_close(y[1], float64(y[0])[:, ::-1])


def test_outside_of_jit_a_second_call_compiles_nothing(compilations):
    x, w, bias = dense_operands(DENSE[2], per_tensor())
    ops.matmul(x, w, activation=per_tensor(), bias=bias)
    before = len(compilations)
    ops.matmul(x, w, activation=per_tensor(), bias=bias)
    assert len(compilations) == before


@pytest.mark.parametrize(("weight", "activation"), PAIRS, ids=str)
def test_lowers_for_cuda(weight, activation):
    x, w, bias = dense_operands(DENSE[1], weight)
    call = jax.jit(lambda x, w, bias: ops.matmul(x, w, activation=activation, bias=bias))
    assert call.trace(x, w, bias).lower(lowering_platforms=("cuda",)).as_text()


class TestGradient:
    """Straight through the rounding, at any magnitude: an 8-bit gradient without a scale would be zero, or NaN."""

    @pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
    @pytest.mark.parametrize(("weight", "activation"), [(per_row(), None), (per_row(), per_row()), (mx(), mx())])
    def test_is_that_of_the_dequantized_product(self, weight, activation, magnitude):
        x, w, bias = dense_operands(DENSE[3], weight, jnp.float32)
        dy = magnitude * jax.random.normal(jax.random.key(1), (x.shape[0], w.shape[0]))
        _, vjp = jax.vjp(lambda x, bias: ops.matmul(x, w, activation=activation, bias=bias), x, bias)
        dx, dbias = vjp(dy)
        assert_close(dx, float64(dy) @ float64(w))
        assert_close(dbias, float64(dy).sum(0))

    def test_types_are_those_of_the_arguments(self):
        x, w, bias = dense_operands(DENSE[1], per_row(), jnp.float16)
        grads = jax.grad(lambda x, bias: ops.matmul(x, w, bias=bias).sum().astype(jnp.float32), (0, 1))(x, bias)
        assert [grad.dtype for grad in grads] == [jnp.float16, jnp.float16]

    def test_is_zero_where_a_given_scale_clips(self):
        x, w, _ = dense_operands(DENSE[4], per_row(), jnp.float32)
        scheme, scale = Scheme("e4m3", block=(None, 128)), jnp.asarray([[1 / 448, 2 / 448]], jnp.float32)
        dx = jax.grad(lambda x: ops.matmul(x, w, activation=scheme, activation_scale=scale).sum())(x)
        inside = np.abs(np.asarray(x)) <= np.where(np.arange(200) < 128, 1, 2)
        assert 0.1 < inside.mean() < 0.9
        assert_close(dx, np.where(inside, float64(w).sum(0), 0))

    def test_weights_and_scales_are_frozen(self):
        x, w, _ = dense_operands(DENSE[1], per_tensor(), jnp.float32)
        scale = jnp.ones((1, 1))

        def loss(x, w_scale, scale):
            w_ = fp8x.ScaledArray(w.data, w_scale, w.scheme)
            return ops.matmul(x, w_, activation=per_tensor(), activation_scale=scale).sum()

        _, dw, dscale = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w.scale, scale)
        assert not np.any(dw) and not np.any(dscale)

    def test_in_jit_and_vmap(self):
        x, w, _ = dense_operands(DENSE[3], per_row(), jnp.float32)
        grad = jax.jit(jax.vmap(jax.grad(lambda row: ops.matmul(row, w, activation=per_row()).sum())))
        assert_close(grad(x), np.broadcast_to(float64(w).sum(0), x.shape))


X, W = np.zeros((2, 64), np.float32), quantized_zeros((8, 64), per_row())


@pytest.mark.parametrize(
    ("x", "w", "options", "match"),
    [
        (X, np.zeros((8, 64), np.float32), {}, r"w: a \w+ came; use a ScaledArray \[N, K\]"),
        (X, quantized_zeros((2, 8, 64), per_row()), {}, r"w: shape is \(2, 8, 64\); use \[N, K\]"),
        (X[:, :32], W, {}, r"x: shape is \(2, 32\), but w \(8, 64\) takes rows \[M, 64\]"),
        (X.astype(np.int32), W, {}, "x: dtype is int32; use one of bfloat16, float16, float32 or a ScaledArray"),
        (quantized_zeros(X.shape, per_row()), W, dict(activation=per_row()), "activation: x is quantized already"),
        (quantized_zeros((2, 3, 64), Scheme("e4m3", block=(2, None))), W, {}, r"are none of \[M, K\]"),
        (X, W, dict(bias=np.zeros(7, np.float32)), r"bias: shape is \(7,\), but w needs \(8,\)"),
        (X, W, dict(out_dtype=jnp.int8), "out_dtype: int8 does not fit"),
        (X, W, dict(activation_scale=np.ones((2, 1), np.float32)), "activation_scale: it came without activation"),
        (
            X,
            W,
            dict(activation=per_row(), activation_scale=np.ones((1, 1), np.float32)),
            r"float32\[1, 1\] does not fit x \(2, 64\)",
        ),
        (X[:, :48], quantized_zeros((8, 48), per_row()), dict(activation=mx()), "x: dim 1 .* is 48"),
    ],
)
def test_errors_name_the_argument(x, w, options, match):
    with pytest.raises(ShapeError, match=match):
        ops.matmul(x, w, **options)


def test_the_metric_sees_one_wrong_row():
    x, w, _ = dense_operands(DENSE[5], per_row())
    y = metric.matmul(x, w)
    wrong = y.copy()
    wrong[17] = y[16]
    assert relative_error(wrong, y) > 2 * max(TOLERANCE.values())


@pytest.mark.sample
@pytest.mark.parametrize(
    ("scheme", "lead"),
    [
        (scheme, lead)
        for scheme in (per_row(), per_tensor(), mx(), Scheme("e4m3", block=(64,)))
        for lead in ((), (3,), (2, 3), (2, 1, 3))
        if len(lead) + 1 >= len(scheme.block)
    ],
    ids=str,
)
def test_quantized_input_of_any_rank(scheme, lead):
    w = quantize(jax.random.normal(jax.random.key(0), (8, 64)), per_row())
    x = quantize(jax.random.normal(jax.random.key(1), (*lead, 64)), scheme)
    y = ops.matmul(x, w, out_dtype=jnp.float32)
    assert y.shape == (*lead, 8)
    assert_close(y, float64(x) @ float64(w).T, short_sums=on_tensor_cores(scheme))
