"""What a layer in calibration gathers of its input: an amax, counts, a histogram. Each joins by a maximum or a sum.

The order of batches, devices and processes changes no bit of any of them: maxima of floats and sums of integers are
associative and commutative.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float64, Int64, UInt32

from fp8x.numerics import rounded
from fp8x.scheme import Scheme


class Amax(nnx.Variable):
    """The largest finite magnitude of a layer's input, float32, in the shape of its `InputScale`."""


class TokenCount(nnx.Variable):
    """Rows that a layer has seen, int32: `[]`, or `[E]` for one matrix per expert."""


class NonfiniteCount(nnx.Variable):
    """Rows among them that hold NaN or Inf, int32 `[]`."""


class Histogram(nnx.Variable):
    """How often each magnitude came, uint32 `[2, groups, BINS]`: the low `LOW_BITS` of every count, and the rest.

    A bin is a bfloat16 magnitude (activations in another type are rounded to it), so that nothing depends on the range
    of the data. Bin 0 holds zero and what is below `2^MIN_EXPONENT`, the last one all that is larger too.
    """


Statistic = nnx.Any(Amax, TokenCount, NonfiniteCount, Histogram)

MIN_EXPONENT, OCTAVES = -40, 64
_MANTISSA_BITS = 7
BINS = OCTAVES << _MANTISSA_BITS
_FIRST = (MIN_EXPONENT + 127) << _MANTISSA_BITS

# Sums of the low parts over 4096 devices fit in 32 bits, and so do those of the rest up to 2^52 values in all.
LOW_BITS = 20


def bin_magnitudes() -> Float64[np.ndarray, " bins"]:
    """The magnitude that each bin counts; 0 for the first."""
    bits = (np.arange(BINS, dtype=np.uint32) + _FIRST) << (23 - _MANTISSA_BITS)
    magnitudes = bits.view(np.float32).astype(np.float64)
    magnitudes[0] = 0.0
    return magnitudes


def count_bins(x: Float[Array, "m k"], scheme: Scheme, is_row: Bool[Array, " m"] | None) -> UInt32[Array, "2 groups b"]:
    """The histogram of `x`, by group of K: finite values of the rows in `is_row` (None: of all)."""
    k = x.shape[1]
    groups, width = scheme.scale_shape(x.shape)[1], scheme.block_of(x.shape)[1]
    x = rounded(x)
    shortened = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=_MANTISSA_BITS)
    bits = jax.lax.bitcast_convert_type(jnp.abs(shortened), jnp.int32) >> (23 - _MANTISSA_BITS)
    index = jnp.clip(bits - _FIRST, 0, BINS - 1) + BINS * (jnp.arange(k) // width)
    is_counted = jnp.isfinite(x) if is_row is None else jnp.isfinite(x) & is_row[:, None]
    index = jnp.where(is_counted, index, groups * BINS)
    counts = jnp.zeros(groups * BINS, jnp.uint32).at[index.reshape(-1)].add(1, mode="drop").reshape(groups, BINS)
    return _carry(counts, jnp.zeros_like(counts))


def add_counts(one: UInt32[Array, "2 groups b"], other: UInt32[Array, "2 groups b"]) -> UInt32[Array, "2 groups b"]:
    """The sum of two histograms."""
    return _carry(one[0] + other[0], one[1] + other[1])


def total_counts(histogram: UInt32[np.ndarray, "... 2 groups b"]) -> Int64[np.ndarray, "... groups b"]:
    """A histogram, or a sum of those of many devices, as whole numbers."""
    low, rest = np.moveaxis(histogram.astype(np.int64), -3, 0)
    return low + (rest << LOW_BITS)


def _carry(low: UInt32[Array, "groups b"], rest: UInt32[Array, "groups b"]) -> UInt32[Array, "2 groups b"]:
    return jnp.stack([low & ((1 << LOW_BITS) - 1), rest + (low >> LOW_BITS)])
