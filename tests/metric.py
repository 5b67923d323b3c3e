"""The one error metric, and the truth it compares with: float64 products of dequantized arrays, in numpy alone."""

import os

import jax
import numpy as np

from fp8x.array import ScaledArray
from fp8x.scheme import Scheme

# What fp8x/ops/__init__.py promises: one rounding to the output type, and float32 accumulation; and where tensor cores
# multiply 8 bits by 8 bits, with shorter sums that are promoted every 128 of K.
TOLERANCE = {np.dtype(dtype): 2.0**-bits + 2.0**-18 for dtype, bits in [("bfloat16", 8), ("float16", 11), ("f4", 24)]}
SHORT_SUMS = TOLERANCE | {np.dtype("float16"): 3.7e-4, np.dtype("f4"): 2.5e-4}


def relative_error(actual, expected) -> float:
    """`‖actual - expected‖ / ‖expected‖` in the Frobenius norm; of nothing or zeros it is zero only if both are."""
    actual, expected = float64(actual), float64(expected)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / (norm if norm else 1.0))


def assert_close(actual, expected, *, short_sums: bool = False, tolerance: float | None = None) -> None:
    """The relative error is within the tolerance of `actual`'s type, unless another is given.

    Arguments:
        short_sums: whether tensor cores, or their emulation, have added products of two 8-bit operands.
    """
    limits = SHORT_SUMS if short_sums else TOLERANCE
    error, limit = relative_error(actual, expected), tolerance or limits[np.dtype(actual.dtype)]
    assert error <= limit, f"relative error {error:.3g} is over {limit:.3g}"


def on_tensor_cores(activation: Scheme | None) -> bool:
    """Whether ops multiply 8 bits by 8 bits by kernels without being asked: where the tests of ops run on a Hopper."""
    by_kernels = jax.default_backend() == "gpu" and os.environ.get("FP8X_BACKEND") != "xla"
    return by_kernels and activation is not None and not activation.is_mx


def assert_codes_close(actual: ScaledArray, expected: ScaledArray) -> None:
    """What `gated_matmul` promises: few codes differ between a kernel with short sums and XLA, and by little."""
    share = np.mean(as_bits(actual.data) != as_bits(expected.data))
    assert share < 4e-2, f"{share:.2%} of the codes differ"
    assert_close(float64(actual), float64(expected), tolerance=2e-2)


def float64(x) -> np.ndarray:
    """`x` in float64, dequantized if it is a ScaledArray."""
    if not isinstance(x, ScaledArray):
        return np.asarray(x).astype(np.float64)
    scale = np.asarray(x.scale).astype(np.float64)
    named = len(x.scheme.block)
    for axis, block in enumerate(x.scheme.block, start=x.ndim - named):
        rows = x.shape[axis]
        scale = np.repeat(scale, rows if block is None else block, axis=axis).take(range(rows), axis=axis)
    return np.asarray(x.data).astype(np.float64) * scale


def matmul(x, w, bias=None) -> np.ndarray:
    """`x @ w.T + bias` in float64."""
    y = float64(x) @ float64(w).T
    return y if bias is None else y + float64(bias)


def grouped_matmul(x, w, group_sizes, bias=None) -> np.ndarray:
    """`matmul` of each group's rows by its own matrix `[N, K]` (or `[P, N, K]`), float64; zero for rows past them."""
    x, w, ends = float64(x), float64(w), np.cumsum(group_sizes)
    y = np.zeros((x.shape[0], *w.shape[1:-1]))
    for e, (size, end) in enumerate(zip(group_sizes, ends)):
        rows = slice(end - size, end)
        y[rows] = np.einsum("mk,...k->m...", x[rows], w[e]) + (0 if bias is None else float64(bias)[e])
    return y


def as_bits(x) -> np.ndarray:
    """The bytes of an array, for bit-for-bit comparison of any type."""
    x = np.asarray(x)
    return np.frombuffer(x.tobytes(), np.uint8)
