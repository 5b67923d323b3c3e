"""`ops.grouped_matmul` against float64, and its gradient."""

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from metric import assert_close, float64, on_tensor_cores
from shapes import GROUPED, Shape, fits, operands, quantize, quantized_zeros

import fp8x
from fp8x import ops
from fp8x.errors import ShapeError
from fp8x.ops import reference
from fp8x.ops.gate import gated
from fp8x.ops.groups import row_mask
from fp8x.scheme import Scheme, mx, per_row, per_tensor

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
PAIRS = [
    (per_tensor(), per_tensor()),
    (Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(1, 128))),
    (mx(), mx()),
    (per_row("e5m2"), None),
    (Scheme("e4m3", block=(None, None, None)), Scheme("e5m2", block=(None, 128))),
]
CASES = [
    pytest.param(shape, *pair, DTYPES[(i + j) % 3], (i + j) % 2 == 0, id=f"{shape}-{pair[0]} by {pair[1]}")
    for i, shape in enumerate(GROUPED)
    for j, pair in enumerate(PAIRS)
    if fits(shape, *pair)
]
MIXED = GROUPED[1]


def as_multiplied(x, group_sizes, activation):
    """What the op multiplies: rows past the groups enter no scale."""
    x = jnp.where(row_mask(group_sizes, x.shape[0])[:, None], x, 0)
    return x if activation is None else quantize(x, activation)


@pytest.mark.sample
@pytest.mark.parametrize(("shape", "weight", "activation", "dtype", "use_bias"), CASES)
def test_product(shape, weight, activation, dtype, use_bias):
    given = operands(shape, weight, dtype=dtype)
    bias = given.bias if use_bias else None
    y = ops.grouped_matmul(given.x, given.w, given.group_sizes, activation=activation, bias=bias)
    assert y.dtype == dtype and y.shape == (shape.m, shape.n)
    x = as_multiplied(given.x, given.group_sizes, activation)
    expected = metric.grouped_matmul(x, given.w, shape.group_sizes, bias)
    assert_close(y, expected, short_sums=on_tensor_cores(activation))
    assert not np.any(y[shape.m - shape.spare :]), "rows past the groups are zero"


@pytest.mark.parametrize("sizes", [(3, -2, 2**31 - 1, 7), (500, 500, 500, 500), (-1, -1, -1, -1)])
def test_traced_sizes_that_do_not_fit(sizes):
    """What is negative is nothing; groups end where the rows do."""
    given, left, cut = operands(MIXED, per_row()), MIXED.m, []
    for size in sizes:
        cut.append(min(max(size, 0), left))
        left -= cut[-1]
    y = jax.jit(lambda sizes: ops.grouped_matmul(given.x, given.w, sizes, activation=per_row()))(np.int32(sizes))
    x = as_multiplied(given.x, np.int32(cut), per_row())
    assert_close(y, metric.grouped_matmul(x, given.w, cut))


def test_reference_meets_the_contract():
    shape = GROUPED[6]
    given = operands(shape, per_row())
    x = as_multiplied(given.x, given.group_sizes, per_row())
    y = reference.grouped_matmul(x, given.w, given.group_sizes, given.bias, jnp.bfloat16)
    assert_close(y, metric.grouped_matmul(x, given.w, shape.group_sizes, given.bias))


def test_one_group_is_the_dense_product():
    given = operands(GROUPED[5], per_row())
    w = fp8x.ScaledArray(given.w.data[0], given.w.scale[0], per_row())
    expected = ops.matmul(given.x, w, activation=per_row(), bias=given.bias[0])
    y = ops.grouped_matmul(given.x, given.w, given.group_sizes, activation=per_row(), bias=given.bias)
    assert_close(y, float64(expected))


def test_scales_shared_by_pairs_of_experts():
    given = operands(MIXED, Scheme("e4m3", block=(2, None, None)))
    assert given.w.scale.shape == (2, 1, 1)
    y = ops.grouped_matmul(given.x, given.w, given.group_sizes)
    assert_close(y, metric.grouped_matmul(given.x, given.w, MIXED.group_sizes))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int16, np.int64, list])
def test_group_sizes_of_any_integer_type(dtype):
    shape = Shape((0, 200, 0, 100), 32, 64)
    given = operands(shape, per_row())
    sizes = list(shape.group_sizes) if dtype is list else np.asarray(shape.group_sizes, dtype)
    expected = ops.grouped_matmul(given.x, given.w, given.group_sizes)
    np.testing.assert_array_equal(ops.grouped_matmul(given.x, given.w, sizes), expected)


@pytest.mark.slow
def test_static_scale_ignores_rows_past_the_groups():
    shape, scheme = GROUPED[6], Scheme("e4m3", block=(None, 128))
    given = operands(shape, per_tensor())
    scale = as_multiplied(given.x, given.group_sizes, scheme).scale
    options = dict(activation=scheme, bias=given.bias)
    expected = ops.grouped_matmul(given.x, given.w, given.group_sizes, **options)
    y = ops.grouped_matmul(given.x, given.w, given.group_sizes, activation_scale=scale, **options)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.sample
@pytest.mark.parametrize(("weight", "activation"), [PAIRS[0], PAIRS[1], PAIRS[3]], ids=str)
def test_rows_of_an_input_in_another_order(weight, activation):
    """As if they were taken first; the gradient of a row that is taken twice is the sum."""
    shape = GROUPED[6]
    given, rows = operands(shape, weight, dtype=jnp.float32), np.arange(127) * 5 % 31
    x, scale = jnp.nan_to_num(given.x[:31]), None
    if activation is not None and activation.block[0] is None:
        scale = quantize(x, activation).scale

    def run(x, rows):
        options = dict(activation=activation, activation_scale=scale, bias=given.bias)
        return ops.grouped_matmul(x, given.w, given.group_sizes, rows=rows, **options)

    y, gradient = jax.vjp(lambda x: run(x, rows), x)
    expected, expected_gradient = jax.vjp(lambda x: run(x[rows], None), x)
    np.testing.assert_array_equal(y, expected)
    assert_close(gradient(y)[0], float64(expected_gradient(y)[0]))
    q = x if activation is None else quantize(x, activation)
    quantized = ops.grouped_matmul(q, given.w, given.group_sizes, rows=rows, bias=given.bias, out_dtype=jnp.float32)
    np.testing.assert_array_equal(quantized, expected)


@pytest.mark.sample
@pytest.mark.parametrize(("weight", "activation"), [PAIRS[0], PAIRS[1], PAIRS[3]], ids=str)
def test_an_input_through_a_gate(weight, activation):
    """As if gate and up had met before; the gradient is that of both steps."""
    shape, sizes = GROUPED[6], GROUPED[6].group_sizes
    given = operands(shape, weight, dtype=jnp.float32)
    x = jnp.stack([given.x, jnp.roll(given.x, 1, axis=1)], axis=1)
    scale = None
    if activation is not None and activation.block[0] is None:
        scale = quantize(jnp.nan_to_num(gated(x, "silu")), activation).scale

    def run(x, gate):
        options = dict(activation=activation, activation_scale=scale, bias=given.bias)
        return ops.grouped_matmul(x, given.w, given.group_sizes, gate=gate, **options)

    y, gradient = jax.vjp(lambda x: run(x, "silu"), x)
    expected, expected_gradient = jax.vjp(lambda x: run(gated(x, "silu"), None), x)
    np.testing.assert_array_equal(y, expected)
    rows = slice(0, sum(sizes))  # what lies past the groups is NaN here
    assert_close(gradient(y)[0][rows], float64(expected_gradient(y)[0][rows]))


def test_traced_sizes_compile_once(compilations):
    given = operands(MIXED, per_row())
    call = jax.jit(lambda x, w, sizes: ops.grouped_matmul(x, w, sizes, activation=per_row()))
    call(given.x, given.w, given.group_sizes)
    before = len(compilations)
    sizes = (0, 193, 0, 0)
    y = call(given.x, given.w, np.asarray(sizes, np.int32))
    assert len(compilations) == before
    assert_close(y, metric.grouped_matmul(quantize(given.x, per_row()), given.w, sizes))


def test_outside_of_jit_a_second_call_compiles_nothing(compilations):
    """The loop over tiles is a new Python function each time it is traced."""
    given = operands(MIXED, mx())
    ops.grouped_matmul(given.x, given.w, given.group_sizes, activation=mx(), bias=given.bias)
    before = len(compilations)
    ops.grouped_matmul(given.x, given.w, given.group_sizes, activation=mx(), bias=given.bias)
    assert len(compilations) == before


def test_vmap_over_rows_and_sizes():
    given = operands(MIXED, per_row())
    sizes = jnp.asarray([MIXED.group_sizes, MIXED.group_sizes[::-1]])
    xs = jnp.stack([given.x, -given.x])
    y = jax.vmap(lambda x, sizes: ops.grouped_matmul(x, given.w, sizes))(xs, sizes)
    for i in range(2):
        assert_close(y[i], metric.grouped_matmul(xs[i], given.w, sizes[i].tolist()))


def test_vmap_over_weights():
    given = operands(MIXED, per_row())
    weights = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), given.w)
    y = jax.vmap(lambda w: ops.grouped_matmul(given.x, w, given.group_sizes))(weights)
    reversed_w = jax.tree.map(lambda leaf: leaf[::-1], given.w)
    assert_close(y[1], metric.grouped_matmul(given.x, reversed_w, MIXED.group_sizes))


@pytest.mark.parametrize(("weight", "activation"), PAIRS, ids=str)
def test_lowers_for_cuda(weight, activation):
    given = operands(MIXED, weight)
    call = jax.jit(lambda x, w, sizes: ops.grouped_matmul(x, w, sizes, activation=activation))
    assert call.trace(given.x, given.w, given.group_sizes).lower(lowering_platforms=("cuda",)).as_text()


class TestGradient:
    @pytest.mark.sample
    @pytest.mark.parametrize(("weight", "activation"), [PAIRS[1], PAIRS[3]], ids=str)
    def test_is_that_of_the_dequantized_product(self, weight, activation):
        shape = GROUPED[6]
        given = operands(shape, weight, dtype=jnp.float32)
        dy = 1e-6 * jax.random.normal(jax.random.key(1), (shape.m, shape.n))

        def run(x, bias):
            return ops.grouped_matmul(x, given.w, given.group_sizes, activation=activation, bias=bias)

        dx, dbias = jax.vjp(run, given.x, given.bias)[1](dy)
        w = float64(given.w).swapaxes(1, 2)
        assert_close(dx, metric.grouped_matmul(dy, w, shape.group_sizes))
        ends = np.cumsum(shape.group_sizes)
        expected = [float64(dy)[end - size : end].sum(0) for size, end in zip(shape.group_sizes, ends)]
        assert_close(dbias, np.stack(expected))

    def test_holds_one_dequantized_expert_at_a_time(self):
        shape = Shape((8,) * 32, 512, 512)
        given = operands(shape, per_tensor())

        def loss(x):
            return ops.grouped_matmul(x, given.w, given.group_sizes, activation=per_row(), out_dtype=jnp.float32).sum()

        memory = jax.jit(jax.grad(loss)).lower(given.x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < given.w.data.size / 2  # float32 copies of all experts are 8 times that


X, W, SIZES = np.zeros((4, 64), np.float32), quantized_zeros((3, 8, 64), per_row()), np.int32([1, 0, 2])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (dict(w=quantized_zeros((8, 64), per_row())), r"w: shape is \(8, 64\); use \[E, N, K\]"),
        (dict(x=X[None]), r"x: shape is \(1, 4, 64\), but w \(3, 8, 64\) takes rows \[M, 64\]"),
        (dict(x=X[:, 1:]), r"x: shape is \(4, 63\)"),
        (dict(gate="silu"), r"x: shape is \(4, 64\), but w \(3, 8, 64\) takes rows \[M, 2, 64\]"),
        (dict(gate="swish"), "activation: 'swish' is unknown; use one of 'silu'"),
        (dict(gate="silu", x=quantized_zeros(X.shape, per_row())), "gate: x is quantized already"),
        (dict(group_sizes=SIZES[:2]), r"group_sizes: shape is \(2,\), but the weights hold 3 experts"),
        (dict(group_sizes=SIZES.astype(np.float32)), "group_sizes: dtype is float32"),
        (dict(group_sizes=SIZES + 1), "group_sizes: they sum to 6, but x has 4 rows"),
        (dict(group_sizes=SIZES - 1), "group_sizes: group 1 is -1"),
        (dict(bias=np.zeros(8, np.float32)), r"bias: shape is \(8,\), but w needs \(3, 8\)"),
        (dict(rows=np.zeros(2, np.float32)), r"rows: float32\[2\] does not fit; use int32\[M\], rows of x"),
        (dict(rows=np.arange(2, dtype=np.int32)), "group_sizes: they sum to 3, but x has 2 rows"),
        (
            dict(rows=np.arange(3, dtype=np.int32), activation=Scheme("e4m3", block=(128, 128))),
            "rows: they cut the blocks of e4m3 128×128 f32; use blocks of one row",
        ),
    ],
)
def test_errors_name_the_argument(changed, match):
    arguments = dict(x=X, w=W, group_sizes=SIZES) | changed
    with pytest.raises(ShapeError, match=match):
        ops.grouped_matmul(**arguments)
