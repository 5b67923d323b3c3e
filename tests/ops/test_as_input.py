"""What ops and layers take as an input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8x
from fp8x.errors import ShapeError

WEIGHT = fp8x.Scheme("e4m3", block=(1, None))
X = np.random.default_rng(0).normal(size=(3, 64))


def test_every_op_takes_float64():
    w = np.random.default_rng(1).normal(size=(2, 48, 64)).astype(np.float32)
    one, experts = (fp8x.quantize(array, WEIGHT) for array in (w[0], w))
    for op in (
        lambda x: fp8x.ops.matmul(x, one),
        lambda x: fp8x.ops.grouped_matmul(x, experts, np.int32([1, 2])),
        lambda x: fp8x.ops.expert_matmul(x, experts, np.int32([1, 0, 1])),
    ):
        y = op(X)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(y, op(jnp.asarray(X, jnp.float32)))


def test_also_where_jax_has_64_bits():
    with jax.enable_x64(True):
        layer = fp8x.nn.Linear(64, 48, recipe="e4m3_bf16", rngs=nnx.Rngs(0))
        assert layer(jnp.asarray(X)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (None, "x: a NoneType came; use an array"),
        ({"x": 1}, "x: a dict came"),
        ([[1.0], [1.0, 2.0]], "x: a list came"),
        (np.ones((3, 64), np.int32), "x: dtype is int32; use one of bfloat16, float16, float32"),
    ],
)
def test_what_is_no_input(x, match):
    with pytest.raises(ShapeError, match=match):
        fp8x.ops.matmul(x, fp8x.quantize(np.ones((48, 64), np.float32), WEIGHT))
