"""Kernels' PTX against float64: a form with 8-bit activations and one with 16-bit ones. All forms are slow, in
tests/pallas/test_emulated.py."""

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from metric import assert_close
from shapes import Shape, operands, quantize

import fp8x
from fp8x import ops
from fp8x.pallas import aot
from fp8x.scheme import Scheme, mx, per_row
from ptx.emulated import emulated

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


@pytest.mark.sample
@pytest.mark.parametrize(
    ("weight", "activation"),
    [(Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(1, 128))), (per_row(), None)],
    ids=["fp8 blocks", "w8a16"],
)
def test_ragged_groups(weight, activation):
    """Stores of 1, 2, 4 rows, an empty group, rows past the groups; K and N that no tile divides."""
    shape = Shape((7, 0, 64, 21), 120, 160, spare=40)
    given = operands(shape, weight)
    with emulated(), fp8x.backend("mosaic_gpu"):
        y = np.asarray(ops.grouped_matmul(given.x, given.w, given.group_sizes, activation=activation, bias=given.bias))
    x = jnp.nan_to_num(given.x)
    x = x if activation is None else quantize(x, activation)
    expected = metric.grouped_matmul(x, given.w, shape.group_sizes, given.bias)
    assert_close(y, expected, short_sums=activation is not None)
    assert not np.any(y[shape.m - shape.spare :]), "rows past the groups are zero"


@pytest.mark.parametrize("weight", [per_row(), pytest.param(mx(), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("sizes", [(3, -2, 2**31 - 1, 7), pytest.param((500, 500), marks=pytest.mark.slow)], ids=str)
def test_traced_sizes_that_do_not_fit(weight, sizes):
    """No access is out of bounds, which the emulator would say, and the result is XLA's."""
    given = operands(Shape((12,) + (0,) * (len(sizes) - 1), 72, 128), weight)
    activation = None if weight.is_mx else per_row()

    def product(x, w, sizes):
        return ops.grouped_matmul(x, w, sizes, activation=activation)

    arguments = given.x, given.w, np.int32(sizes)
    with emulated(), fp8x.backend("mosaic_gpu"):
        y = np.asarray(jax.jit(product)(*arguments))
    expected = np.asarray(jax.jit(product)(*arguments))
    assert_close(y, expected, short_sums=activation is not None)
    assert np.any(y[-1])
