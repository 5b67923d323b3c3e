"""The emulated tensor cores' sums, beside the errors that an H200 showed; in numpy alone."""

import ml_dtypes
import numpy as np
import pytest
from metric import relative_error

from ptx.tensor_cores import SUM_BITS, add_products

E4M3 = ml_dtypes.float8_e4m3fn


def by_rows(x: np.ndarray) -> np.ndarray:
    """In float8 with a scale a row."""
    return (x * (448 / np.abs(x).max(axis=1, keepdims=True))).astype(E4M3).astype(np.float64)


def error(a: np.ndarray, b: np.ndarray, bits: int, *, step: int = 32, promoted: int | None = None) -> float:
    """Of the product `a @ b.T` in instructions of `step` of K, whose sums go to registers every `promoted` of K."""
    total, part = np.zeros((2, len(a), len(b)), np.float32)
    for at in range(0, a.shape[1], step):
        part = add_products(part, a[:, at : at + step], b[:, at : at + step], bits)
        if promoted and (at + step) % promoted == 0:
            total, part = total + part, np.zeros_like(part)
    return relative_error(total + part, a @ b.T)


def error_of_fp8(k: int, bits: int = SUM_BITS["e4m3"], promoted: int | None = None) -> float:
    a, b = np.random.default_rng(k).normal(size=(2, 32, k))
    return error(by_rows(a), by_rows(b), bits, promoted=promoted)


@pytest.mark.parametrize(("k", "measured"), [(128, 1.27e-4), (512, 3.40e-4), (2048, 8.52e-4)])
def test_fp8_without_promotion(k, measured):
    """cuBLASLt's fast accumulation. With K of 16384 it had 1.6e-3, less than one chain of sums has: 3e-3."""
    assert error_of_fp8(k) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("k", [128, 512, 2048, 16384])
def test_fp8_promoted(k):
    """cuBLASLt, promoted, had 1.26e-4 to 1.29e-4 for every K, and our kernels 1.25e-4 to 2.07e-4."""
    assert error_of_fp8(k, promoted=128) == pytest.approx(1.27e-4, rel=0.1)


@pytest.mark.parametrize("bits", [12, 14])
def test_other_bits_are_not_what_was_measured(bits):
    assert error_of_fp8(2048, bits, promoted=128) != pytest.approx(1.27e-4, rel=0.5)


@pytest.mark.parametrize(("k", "measured"), [(128, 7.0e-8), (416, 2.36e-7)])
def test_16_bits(k, measured):
    """Weights of 8 bits by activations of 16, as tests/gpu has them: columns of K differ in magnitude."""
    rng = np.random.default_rng(k)
    a = (rng.normal(size=(32, k)) * np.exp(rng.normal(size=k))).astype(ml_dtypes.bfloat16).astype(np.float64)
    found = error(a, by_rows(rng.normal(size=(32, k))), SUM_BITS["bf16"], step=16)
    assert found == pytest.approx(measured, rel=0.25)


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
