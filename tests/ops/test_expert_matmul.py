"""`ops.expert_matmul` against float64, its gradient, and `ops.grouped_matmul` of the same rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metric import assert_close, float64, on_tensor_cores
from shapes import GROUPED, Shape, fits, operands, quantize, quantized_zeros

from fp8x import ops
from fp8x.errors import ShapeError
from fp8x.ops import reference
from fp8x.ops.gate import gated
from fp8x.scheme import Scheme, mx, per_row, per_tensor

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
PAIRS = [
    (per_tensor(), per_tensor()),
    (Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(1, 128))),
    (mx(), mx()),
    (per_row("e5m2"), None),
    (Scheme("e4m3", block=(None, None, None)), Scheme("e5m2", block=(None, 128))),
]
# Rows of a token or two; twice the same expert; experts that are elsewhere, whose rows of x are NaN; and no rows.
SHAPES = [
    (Shape((0, 0, 1, 0, 0, 0, 0, 1), 96, 200), (6, 2)),
    (Shape((0, 1, 0, 2), 72, 160, spare=2), (3, 4, 1, -1, 3)),
    (Shape((0, 0, 0, 1), 33, 416), (3,)),
    (Shape((0, 0), 64, 128), ()),
]
CASES = [
    pytest.param(shape, experts, *pair, DTYPES[(i + j) % 3], (i + j) % 2 == 0, id=f"{shape}-{pair[0]} by {pair[1]}")
    for i, (shape, experts) in enumerate(SHAPES)
    for j, pair in enumerate(PAIRS)
    if fits(shape, *pair) and (len(experts) > 1 or j % 2)  # every pair by many rows, some by one and by none
]
SMALL, EXPERTS = SHAPES[1]


def operands_of(shape: Shape, experts: tuple[int, ...], weight: Scheme, dtype=jnp.bfloat16):
    """Operands whose rows are in the order of `experts`; those of no expert hold NaN."""
    given = operands(shape, weight, dtype=dtype)
    is_row = np.asarray([0 <= e < given.w.shape[0] for e in experts], bool)
    x = jnp.where(is_row[:, None], jnp.nan_to_num(given.x, nan=1.0), jnp.nan)
    return x, given.w, np.asarray(experts, np.int32), given.bias


def as_multiplied(x, activation):
    """What the op multiplies: rows of no expert enter no scale."""
    x = jnp.nan_to_num(x)
    return x if activation is None else quantize(x, activation)


def truth(x, w, experts, bias=None) -> np.ndarray:
    x, w = float64(x), float64(w)
    y = np.zeros((x.shape[0], w.shape[1]))
    for row, e in enumerate(experts):
        if 0 <= e < w.shape[0]:
            y[row] = w[e] @ x[row] + (0 if bias is None else float64(bias)[e])
    return y


@pytest.mark.sample
@pytest.mark.parametrize(("shape", "experts", "weight", "activation", "dtype", "use_bias"), CASES)
def test_product(shape, experts, weight, activation, dtype, use_bias):
    x, w, experts, bias = operands_of(shape, experts, weight, dtype)
    bias = bias if use_bias else None
    y = ops.expert_matmul(x, w, experts, activation=activation, bias=bias)
    assert y.dtype == dtype and y.shape == (len(experts), shape.n)
    assert_close(y, truth(as_multiplied(x, activation), w, experts, bias), short_sums=on_tensor_cores(activation))
    assert not np.any(y[(experts < 0) | (experts >= w.shape[0])]), "rows of no expert are zero"


def test_reference_meets_the_contract():
    x, w, experts, bias = operands_of(SMALL, EXPERTS, per_row())
    x = as_multiplied(x, per_row())
    y = reference.expert_matmul(x, w, np.where(experts < 0, 4, experts), bias, jnp.bfloat16)
    assert_close(y, truth(x, w, experts, bias))


def test_sorted_rows_are_a_grouped_product():
    given = operands(GROUPED[4], per_row())
    experts = np.repeat(np.arange(4), GROUPED[4].group_sizes)
    y = ops.expert_matmul(given.x, given.w, experts, activation=per_row(), bias=given.bias)
    assert_close(
        y, float64(ops.grouped_matmul(given.x, given.w, given.group_sizes, activation=per_row(), bias=given.bias))
    )


def test_an_input_that_is_quantized_and_experts_of_any_integer_type():
    x, w, experts, _ = operands_of(*SHAPES[0], per_tensor())
    q = quantize(x, per_row())
    expected = ops.expert_matmul(x, w, experts, activation=per_row())
    for dtype in (np.uint8, np.int64):
        np.testing.assert_array_equal(ops.expert_matmul(q, w, experts.astype(dtype)), expected)


def test_static_scale_ignores_rows_of_no_expert():
    scheme = Scheme("e4m3", block=(None, 128))
    x, w, experts, bias = operands_of(SMALL, EXPERTS, per_tensor())
    scale = as_multiplied(x, scheme).scale
    expected = ops.expert_matmul(x, w, experts, activation=scheme, bias=bias)
    y = ops.expert_matmul(x, w, experts, activation=scheme, activation_scale=scale, bias=bias)
    np.testing.assert_array_equal(y, expected)


def test_rows_that_meet_several_experts():
    x, w, experts, bias = operands_of(*SHAPES[0], per_tensor())
    rows = np.asarray([1, 1])
    y = ops.expert_matmul(x, w, experts, rows=rows, activation=per_row(), bias=bias)
    np.testing.assert_array_equal(y, ops.expert_matmul(x[rows], w, experts, activation=per_row(), bias=bias))
    with pytest.raises(ShapeError, match=r"experts: shape is \(2,\), but x has 1 rows"):
        ops.expert_matmul(x, w, experts, rows=rows[:1])


@pytest.mark.slow
def test_an_input_through_a_gate():
    x, w, experts, bias = operands_of(SMALL, EXPERTS, per_tensor())
    x = jnp.stack([x, -2 * x], axis=1)
    for activation in (per_tensor(), None):
        options = dict(activation=activation, bias=bias)
        y = ops.expert_matmul(x, w, experts, gate="gelu", **options)
        np.testing.assert_array_equal(y, ops.expert_matmul(gated(x, "gelu"), w, experts, **options))


def test_compiles_once_and_holds_one_dequantized_matrix():
    shape = Shape((8,) * 32, 512, 512)
    given = operands(shape, per_tensor())
    call = jax.jit(lambda x, experts: ops.expert_matmul(x, given.w, experts, activation=per_row()))
    x, experts = given.x[:8], jnp.arange(8)
    assert call.lower(x, experts).compile().memory_analysis().temp_size_in_bytes < 3 * 4 * 512 * 512
    assert call(x, experts).shape == call(x, experts[::-1] * 4).shape == (8, 512)
    assert call._cache_size() == 1


def test_vmap():
    x, w, experts, _ = operands_of(*SHAPES[0], per_row())
    y = jax.vmap(lambda x, experts: ops.expert_matmul(x, w, experts))(
        jnp.stack([x, -x]), np.stack([experts, experts[::-1]])
    )
    assert_close(y[0], truth(x, w, experts))
    assert_close(y[1], truth(-x, w, experts[::-1]))


@pytest.mark.parametrize(("weight", "activation"), PAIRS[1:4], ids=str)
def test_lowers_for_cuda(weight, activation):
    x, w, experts, _ = operands_of(SMALL, EXPERTS, weight)
    call = jax.jit(lambda x, w, experts: ops.expert_matmul(x, w, experts, activation=activation))
    assert call.trace(x, w, experts).lower(lowering_platforms=("cuda",)).as_text()


def test_explain_names_the_kernel(no_gpu):
    x, w, experts, _ = operands_of(SMALL, EXPERTS, mx())
    (choice,) = ops.explain(lambda x: ops.expert_matmul(x, w, experts, activation=mx()), x)
    assert choice.kernel == "xla_expert_matmul"
    assert str(choice.call) == (
        "expert_matmul [5, 160] x [72, 160] x 4 groups: e4m3 1×32 e8m0 by e4m3 1×32 e8m0 -> bfloat16"
    )


@pytest.mark.parametrize(("weight", "activation"), [PAIRS[1], PAIRS[3]], ids=str)
def test_gradient_is_that_of_the_dequantized_product(weight, activation):
    x, w, experts, bias = operands_of(SMALL, EXPERTS, weight, jnp.float32)
    dy = 1e-6 * jax.random.normal(jax.random.key(1), (len(experts), SMALL.n))
    dx, dbias = jax.vjp(lambda x, bias: ops.expert_matmul(x, w, experts, activation=activation, bias=bias), x, bias)[1](
        dy
    )
    one_hot = float64(experts[:, None] == np.arange(4))
    assert_close(dx, np.einsum("rn,re,enk->rk", float64(dy), one_hot, float64(w)))
    assert_close(dbias, one_hot.T @ float64(dy))


X, W = np.zeros((4, 64), np.float32), quantized_zeros((3, 8, 64), per_row())


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (dict(w=quantized_zeros((8, 64), per_row())), r"w: shape is \(8, 64\); use \[E, N, K\]"),
        (dict(x=X[:, 1:]), r"x: shape is \(4, 63\)"),
        (dict(experts=np.arange(3)), r"experts: shape is \(3,\), but x has 4 rows; use \[4\]"),
        (dict(experts=np.ones(4)), "experts: dtype is float32; use int32"),
        (dict(bias=np.zeros(8, np.float32)), r"bias: shape is \(8,\), but w needs \(3, 8\)"),
    ],
)
def test_errors_name_the_argument(changed, match):
    arguments = dict(x=X, w=W, experts=np.zeros(4, np.int32)) | changed
    with pytest.raises(ShapeError, match=match):
        ops.expert_matmul(**arguments)
