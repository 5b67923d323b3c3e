"""The emulated tensor cores' sums, beside the errors that an H200 showed; in numpy alone."""

import jax.numpy as jnp
import metric
import ml_dtypes
import numpy as np
import pytest
from metric import relative_error
from shapes import GROUPED, Shape, operands, quantize

from fp8x.ops.groups import row_mask
from fp8x.scheme import per_row, per_tensor
from ptx.tensor_cores import SUM_BITS, add_products

E4M3 = ml_dtypes.float8_e4m3fn
RAGGED = Shape((100, 0, 29, 200, 7), 328, 416, spare=20)


def by_rows(x: np.ndarray) -> np.ndarray:
    """In float8 with a scale a row."""
    return (x * (448 / np.abs(x).max(axis=1, keepdims=True))).astype(E4M3).astype(np.float64)


def sums(a: np.ndarray, b: np.ndarray, bits: int, *, step: int = 32, promoted: int | None = None) -> np.ndarray:
    """`a @ b.T` in instructions of `step` of K, whose sums go to registers every `promoted` of K."""
    total, part = np.zeros((2, len(a), len(b)), np.float32)
    for at in range(0, a.shape[1], step):
        part = add_products(part, a[:, at : at + step], b[:, at : at + step], bits)
        if promoted and (at + step) % promoted == 0:
            total, part = total + part, np.zeros_like(part)
    return total + part


def error_of_fp8(k: int, bits: int = SUM_BITS["e4m3"], promoted: int | None = None) -> float:
    a, b = map(by_rows, np.random.default_rng(k).normal(size=(2, 32, k)))
    return relative_error(sums(a, b, bits, promoted=promoted), a @ b.T)


@pytest.mark.parametrize(("k", "measured"), [(128, 1.27e-4), (512, 3.40e-4), (2048, 8.52e-4)])
def test_fp8_without_promotion(k, measured):
    """cuBLASLt's fast accumulation. With K of 16384 it had 1.6e-3, less than one chain of sums has: 3e-3."""
    assert error_of_fp8(k) == pytest.approx(measured, rel=0.07)


@pytest.mark.parametrize("k", [128, 512, 2048, 16384])
def test_fp8_promoted(k):
    """cuBLASLt, promoted, had 1.26e-4 to 1.29e-4 for every K, and our kernels 1.25e-4 to 2.07e-4."""
    assert error_of_fp8(k, promoted=128) == pytest.approx(1.27e-4, rel=0.07)


@pytest.mark.parametrize("bits", [12, 14])
def test_other_bits_are_not_what_was_measured(bits):
    assert error_of_fp8(2048, bits, promoted=128) != pytest.approx(1.27e-4, rel=0.5)


# The operands of tests/gpu/test_on_hopper.py (test_grouped and test_more_tilings), and the errors that they had.
DATA = {"k160": (GROUPED[2], jnp.float32), "k416": (RAGGED, jnp.bfloat16)}


@pytest.mark.sample
@pytest.mark.parametrize(
    ("data", "weight", "activation", "measured"),
    [
        ("k160", per_row(), per_row(), 1.324e-4),
        ("k160", per_tensor(), per_tensor("e5m2"), 1.259e-4),
        ("k416", per_row(), per_row(), 2.068e-4),
        ("k416", per_tensor(), per_tensor("e5m2"), 1.773e-4),
        ("k160", per_row(), None, 7.078e-8),
        ("k416", per_row(), None, 2.363e-7),
    ],
    ids=str,
)
def test_the_same_products_on_an_h200(data, weight, activation, measured):
    """8-bit ones promoted every 128 of K, 16-bit ones added up by the tensor cores alone."""
    shape, dtype = DATA[data]
    given = operands(shape, weight, dtype=dtype if activation else jnp.bfloat16)
    x = jnp.where(row_mask(given.group_sizes, shape.m)[:, None], given.x, 0)
    x = x if activation is None else quantize(x, activation)
    codes, x_scale = (x, 1) if activation is None else (x.data, np.asarray(x.scale))
    codes, bits, step = np.asarray(codes), SUM_BITS["e4m3" if activation else "bf16"], 32 if activation else 16
    y = np.zeros((shape.m, shape.n), np.float32)
    for e, (size, end) in enumerate(zip(shape.group_sizes, np.cumsum(shape.group_sizes))):
        rows = slice(end - size, end)
        a, b = (m.astype(np.float64) for m in (codes[rows], np.asarray(given.w.data[e])))
        y[rows] = sums(a, b, bits, step=step, promoted=128 if activation else None)
        y[rows] *= np.asarray(given.w.scale)[e, :, 0]
    assert relative_error(y * x_scale, metric.grouped_matmul(x, given.w, shape.group_sizes)) == pytest.approx(
        measured, rel=0.01
    )


def test_what_is_cut_off():
    """Toward zero, below the largest addend, whether that is a product or the sum so far."""
    a, b = np.array([[1.0, 2.0**-13, 1.75 * 2.0**-13, -1.75 * 2.0**-13]]), np.ones((1, 4))
    zero, large = np.zeros((1, 1), np.float32), np.float32([[-(2.0**13)]])
    assert add_products(zero, a, b, 13) == 1 + 2.0**-13
    assert add_products(zero, a, b, 15) == 1 + 2.0**-13
    assert add_products(large, a, b, 13) == 1 - 2.0**13
    assert add_products(2 * large, a, b, 13) == -(2.0**14)


def test_no_number():
    a, b, zero = np.array([[1.0, np.inf]]), np.array([[1.0, 1.0], [1.0, -1.0], [np.nan, 1.0]]), np.zeros((1, 3))
    np.testing.assert_array_equal(add_products(zero, a, b, 13), [[np.inf, -np.inf, np.nan]])
