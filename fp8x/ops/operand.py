"""What the XLA path multiplies: dequantized float32, or, for tensor cores, 16 bits that hold an operand exactly.

A product of float32 matrices takes an H200 an order of magnitude longer than one of 16-bit matrices. Every 8-bit code
is exact in bfloat16 and in float16, and so is an MX block in bfloat16, whose scales are powers of two; a scale that is
one for all of K can wait for the result. Other operands, blocks of 128 among them, stay in float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fp8x.array import ScaledArray
from fp8x.ops.reference import as_float32


class Operand(NamedTuple):
    """A matrix, `values * scale`.

    Attributes:
        values: `[r, k]`; float32, or 16 bits.
        scale: `[r, 1]`, or None for one.
    """

    values: Float[Array, "r k"]
    scale: Float[Array, "r 1"] | None


def common_dtype(x: Float[Array, "m k"] | ScaledArray, w: ScaledArray) -> np.dtype:
    """The 16-bit type that holds both operands of a product exactly, or float32."""
    dtype = x.dtype if not isinstance(x, ScaledArray) else jnp.dtype(jnp.bfloat16)
    is_exact = dtype.itemsize == 2 and all(_is_exact(q, dtype) for q in (x, w))
    return dtype if is_exact else jnp.dtype(jnp.float32)


def _is_exact(q: Array | ScaledArray, dtype: np.dtype) -> bool:
    if not isinstance(q, ScaledArray):
        return True
    return dtype == jnp.bfloat16 if q.scheme.is_mx else q.scheme.block[-1] is None


def as_operand(q: Float[Array, "r k"] | ScaledArray, dtype: np.dtype) -> Operand:
    """`q` in float32, or in the `common_dtype` of a product that it is in."""
    if dtype == jnp.float32:
        return Operand(as_float32(q), None)
    if not isinstance(q, ScaledArray):
        return Operand(q, None)
    if q.scheme.is_mx:
        return Operand(as_float32(q).astype(dtype), None)  # exact, so XLA may fuse it with what comes before and after
    rows, _ = q.scheme.block_of(q.shape)
    return Operand(q.data.astype(dtype), jnp.repeat(q.scale, rows, axis=0)[: q.shape[0]])


def multiply(x: Operand, w: Operand, bias: Float[Array, " n"] | None, out_dtype) -> Float[Array, "m n"]:
    """`x @ w.T` accumulated in float32, times the scales, plus bias; one cast."""
    y = jnp.matmul(x.values, w.values.T, precision="highest", preferred_element_type=jnp.float32)
    y = y if x.scale is None else y * x.scale
    y = y if w.scale is None else y * w.scale.T
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)
