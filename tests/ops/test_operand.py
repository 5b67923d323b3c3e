"""The XLA path as it is where there are tensor cores, run on the CPU: against float64, by the tolerance of the ops."""

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from metric import assert_close
from shapes import DENSE, GROUPED, fits, operands, quantize

import fp8x
from fp8x.ops import xla
from fp8x.ops.groups import row_mask
from fp8x.ops.operand import as_operand, common_dtype
from fp8x.scheme import Scheme, mx, per_row, per_tensor

BF16, F16, F32 = (jnp.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32))
GROUP, BLOCK = Scheme("e4m3", block=(1, 128)), Scheme("e4m3", block=(128, 128))
# Weight, activation, x's own type, and what they are multiplied in.
CASES = [
    (per_tensor(), per_tensor("e5m2"), F32, BF16),
    (per_row("e5m2"), per_row(), F16, BF16),
    (Scheme("e4m3", block=(64, None)), None, BF16, BF16),
    (per_row("e5m2"), None, F16, F16),
    (mx(), mx("e5m2"), F16, BF16),
    (mx(), None, BF16, BF16),
    (mx(), per_row(), F32, BF16),
    (mx(), None, F16, F32),
    (per_row(), None, F32, F32),
    (BLOCK, GROUP, BF16, F32),
    (per_row(), GROUP, BF16, F32),
]


@pytest.fixture(autouse=True)
def other_processors(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))


@pytest.mark.sample
@pytest.mark.parametrize(("weight", "activation", "dtype", "multiplied_in"), CASES, ids=str)
def test_dense(weight, activation, dtype, multiplied_in):
    shape = next(shape for shape in DENSE[2:] if fits(shape, weight, activation))
    given = operands(shape, weight, dtype=dtype)
    w = fp8x.ScaledArray(given.w.data[0], given.w.scale[0], weight)
    x = given.x if activation is None else quantize(given.x, activation)
    assert common_dtype(x, w) == multiplied_in
    y = jax.jit(lambda *operands: xla.matmul(*operands, F32))(x, w, given.bias[0])
    assert_close(y, metric.matmul(x, w, given.bias[0]))


@pytest.mark.sample
@pytest.mark.parametrize(("weight", "activation", "dtype", "multiplied_in"), CASES, ids=str)
def test_grouped(weight, activation, dtype, multiplied_in):
    shape = GROUPED[6]
    given = operands(shape, weight, dtype=dtype)
    x = given.x
    if activation is not None:
        x = quantize(jnp.where(row_mask(given.group_sizes, shape.m)[:, None], x, 0), activation)
    assert common_dtype(x, given.w) == multiplied_in
    y = jax.jit(lambda *operands: xla.grouped_matmul(*operands, F32))(x, given.w, given.group_sizes, given.bias)
    assert_close(y, metric.grouped_matmul(x, given.w, shape.group_sizes, given.bias))
    assert not np.any(y[-shape.spare :])


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_operands_are_exact(element):
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(8, 32)
    codes = jax.lax.bitcast_convert_type(codes, Scheme(element, block=(1, None)).dtype)
    scale = jnp.float32(2.0) ** jnp.arange(-4, 4)[:, None] * 1.1
    q = fp8x.ScaledArray(codes, scale, per_row(element))
    for dtype in (BF16, F16):
        values, factor = as_operand(q, dtype)
        np.testing.assert_array_equal(metric.float64(values) * metric.float64(factor), metric.float64(q))
    powers = jax.lax.bitcast_convert_type(jnp.arange(96, 160, 8, dtype=jnp.uint8)[:, None], jnp.float8_e8m0fnu)
    q = fp8x.ScaledArray(codes, powers, mx(element))
    np.testing.assert_array_equal(metric.float64(as_operand(q, BF16).values), metric.float64(q))
