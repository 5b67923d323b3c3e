"""A matrix from one scheme to another, some rows at a time: what is in memory fits a processor's cache."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.scheme import Scheme

CHUNK_BYTES = 1 << 22  # what is computed from it stays in cache, and a call costs little beside it


def chunks(n: int, k: int, *schemes: Scheme | None) -> Iterator[slice]:
    """Rows at a time, in whole blocks of these schemes; the last may reach beyond `n`, into zeros."""
    whole = math.lcm(*(scheme.block[0] or 1 for scheme in schemes if scheme is not None))
    # Powers of two, and few of them: matrices of unlike heights share a compiled program.
    most = 1 << max(CHUNK_BYTES // (2 * max(k, 1) * whole), 1).bit_length() - 1
    rows = whole * (most if 8 * n >= most * whole else 1 << max(math.ceil(n / whole) - 1, 0).bit_length())
    return (slice(start, start + rows) for start in range(0, n, rows))


def scale_rows(scale: np.ndarray, scheme: Scheme, rows: slice) -> np.ndarray:
    """The scales of some rows of a matrix `[N, K]`, in whole blocks; ones beyond its end."""
    block = scheme.block[0]
    if block is None:
        return scale
    found = scale[rows.start // block : math.ceil(rows.stop / block)]
    missing = math.ceil(rows.stop / block) - rows.start // block - found.shape[0]
    return found if not missing else np.concatenate([found, np.ones((missing, found.shape[1]), found.dtype)])


@functools.partial(jax.jit, static_argnames="scheme")
def quantized(x: Array | ScaledArray, scheme: Scheme) -> tuple[Array, Array, Float[Array, ""]]:
    """Data and scales of `x` in a scheme whose blocks are whole in it, and its largest magnitude.

    Right if that is finite.
    """
    values = _values(x)
    top = numerics.block_max(values, scheme)
    q = numerics.quantize_with_scale(values, numerics.compute_scale(top, scheme), scheme)
    return q.data, q.scale, jnp.max(top, initial=0)


@functools.partial(jax.jit, static_argnames="scheme")
def quantized_finite(x: Array | ScaledArray, scheme: Scheme) -> tuple[Array, Array]:
    """`quantized` by the finite values alone, where NaN and Inf are allowed."""
    q = numerics.quantize(_values(x), scheme)
    return q.data, q.scale


@functools.partial(jax.jit, static_argnames="scheme")
def block_max(x: Array | ScaledArray, scheme: Scheme) -> Float[Array, "1 c"]:
    """Of blocks that go on in other rows; Inf or NaN where one holds it."""
    return numerics.block_max(_values(x), scheme)


@functools.partial(jax.jit, static_argnames="scheme")
def block_amax(x: Array | ScaledArray, scheme: Scheme) -> Float[Array, "1 c"]:
    return numerics.block_amax(_values(x), scheme)


@functools.partial(jax.jit, static_argnames="scheme")
def compute_scale(amax: Float[Array, "1 c"], scheme: Scheme) -> Float[Array, "1 c"]:
    return numerics.compute_scale(amax, scheme)


@functools.partial(jax.jit, static_argnames="scheme")
def with_scale(x: Array | ScaledArray, scale: Float[Array, "1 c"], scheme: Scheme) -> Float[Array, "n k"]:
    """The data of `x` with the scales of the whole matrix."""
    return numerics.quantize_with_scale(_values(x), scale, scheme).data


@functools.partial(jax.jit, static_argnames="dtype")
def unquantized(x: ScaledArray, dtype: np.dtype) -> Float[Array, "n k"]:
    return x.dequantize(dtype)


@jax.jit
def count_nonfinite(x: Array | ScaledArray) -> Array:
    return jnp.sum(~jnp.isfinite(_values(x)))


def _values(x: Array | ScaledArray) -> Float[Array, "n k"]:
    return x.dequantize() if isinstance(x, ScaledArray) else x
