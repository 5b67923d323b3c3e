"""What codes and scales stand for, exactly, where float32 is too narrow: products in float64, by numpy.

A code has at most four significant bits and a scale 24, so their product is exact in float64, whose range holds every
one: 2^-16 * 2^-149 is no smaller than its numbers go. XLA computes in float32. On a CPU it takes what lies below 2^-126
for zero, and beyond 2^128 is Inf: of e8m0 scales these are values of bytes below 17 and above 238.
"""

import warnings

import numpy as np
from jaxtyping import Float

from fp8x.array import ScaledArray
from fp8x.scheme import MIN_SCALE, Scheme

# Between these no product of a code and a scale, nor a difference of two, leaves the normal range of float32.
LOW, HIGH = 2.0**-80, 2.0**100


def products(q: ScaledArray) -> Float[np.ndarray, "n k"]:
    """What a matrix in NumPy's arrays stands for, in float64: its products, rounded to float32 where its scales are
    float32, as their contract has it, but with all subnormal numbers."""
    values = _values_of_codes(q.scheme)[q.data.view(np.uint8)]
    scale = _scales(q.scale, q.scheme)
    for axis, (size, block) in enumerate(zip(q.shape, q.scheme.block_of(q.shape))):
        scale = scale if scale.shape[axis] == 1 else scale.repeat(block, axis).take(range(size), axis)
    with np.errstate(over="ignore"):
        values *= scale
        return values if q.scheme.is_mx else values.astype(np.float32).astype(np.float64)


def is_ordinary(q: ScaledArray) -> bool:
    """Whether float32 holds its products, and differences between them, as normal numbers, by its scales alone."""
    scale = _scales(q.scale, q.scheme)
    return bool(((scale >= LOW) & (scale <= HIGH)).all())


def may_flush(scale: np.ndarray, scheme: Scheme) -> bool:
    """Whether codes may stand for values below float32's normal range, by their scales alone."""
    scale, smallest = np.asarray(scale), _values_of_codes(scheme)[1]
    # Neither minimum is NaN where another scale is there.
    least = scale.view(np.uint8).min(initial=255) if scheme.is_mx else np.fmin.reduce(scale, axis=None, initial=np.inf)
    return bool(_scales(least, scheme) * smallest < MIN_SCALE)


def count_flushed(q: ScaledArray) -> int:
    """How many values lie below float32's normal range and are not zero."""
    if not may_flush(q.scale, q.scheme):
        return 0
    values = np.abs(products(q))
    return int(np.count_nonzero((values > 0) & (values < MIN_SCALE)))


def warn_of_flushed(name: str, count: int, size: int) -> None:
    """Says, of a matrix that is dequantized, that some of its values are lost."""
    if count:
        warnings.warn(
            f"{name}: {count} of {size} values lie below 2^-126, the smallest normal float32, and become zero on a CPU",
            stacklevel=4,
        )


def _values_of_codes(scheme: Scheme) -> Float[np.ndarray, "256"]:
    return np.arange(256, dtype=np.uint8).view(scheme.dtype).astype(np.float64)


def _scales(scale: np.ndarray, scheme: Scheme) -> Float[np.ndarray, "..."]:
    if not scheme.is_mx:
        return np.asarray(scale).astype(np.float64)
    byte = np.asarray(scale).view(np.uint8)
    return np.where(byte == 255, np.nan, np.ldexp(1.0, byte.astype(np.int32) - 127))
