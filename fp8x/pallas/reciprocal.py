"""`1 / x` in registers, as `fp8x.numerics.reciprocal` rounds it. Mosaic divides by an approximation (`rcp.approx`)."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


def reciprocal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`numerics.reciprocal` of normal numbers up to 2^126."""
    return corrected(np.float32(1.0) / x, x)


def corrected(approximation: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / x`, rounded to nearest, from a float32 that is two units in the last place off at most.

    For the 24-bit mantissas of x and of its reciprocal, the product is a power of two over 2^32 but for a remainder of
    a few mantissas: 32 bits tell it exactly. Half a mantissa of it is half a unit of the reciprocal.
    """
    bits = lax.bitcast_convert_type(approximation, jnp.int32)
    mantissa = _mantissa(lax.bitcast_convert_type(x, jnp.int32))
    for _ in range(2):
        remainder = -2 * mantissa * _mantissa(bits)
        bits = bits + (remainder > mantissa).astype(jnp.int32) - (remainder < -mantissa).astype(jnp.int32)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _mantissa(bits: Int[Array, "..."]) -> Int[Array, "..."]:
    """The 24 bits of a normal float32's mantissa."""
    return bits & np.int32(0x7FFFFF) | np.int32(0x800000)
