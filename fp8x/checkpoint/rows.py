"""A matrix from one scheme to another, some rows at a time: what is in memory fits a processor's cache."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt, UInt8

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.scheme import Scheme

CHUNK_BYTES = 1 << 21  # what is computed from it stays in cache, and a call costs little beside it


def chunks(n: int, k: int, *schemes: Scheme | None) -> Iterator[slice]:
    """Rows at a time, in whole blocks of these schemes; the last may reach beyond `n`, into zeros."""
    whole = math.lcm(*(min(scheme.block[0] or 1, max(n, 1)) for scheme in schemes if scheme is not None))
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


def decibels(signal: float, noise: float) -> float:
    """Signal-to-noise ratio, `10 log10(signal / noise)` of two sums of squares; Inf without noise, and -Inf where no
    signal is left of it: there was none, or the noise is not finite."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def mean_decibels(snrs: Iterable[float | None]) -> float | None:
    """The mean of those with an error: Inf where all are exact, -Inf where one is lost, None where none is known."""
    known = [snr for snr in snrs if snr is not None]
    inexact = [snr for snr in known if snr != math.inf]
    return sum(inexact) / len(inexact) if inexact else max(known, default=None)


# `scratch` is an earlier result, whose memory takes the new one: pages that the system has to hand out for every result
# cost as much as computing it. It may not be in use any more; what views results has to leave no reference behind, as
# `np.from_dlpack` does, which knows the integers that results come in.
_compiled = functools.partial(jax.jit, donate_argnames="scratch", keep_unused=True)


@functools.partial(_compiled, static_argnames="scheme")
def quantized(
    x: Array | ScaledArray, scratch: UInt8[Array, "n k"], scheme: Scheme
) -> tuple[UInt8[Array, "n k"], Array, Float[Array, "r c"]]:
    """Data (as bytes) and scales of `x` in a scheme whose blocks are whole in it, and `block_max`.

    Right where that is finite.
    """
    values = _values(x)
    top = numerics.block_max(values, scheme)
    if isinstance(x, ScaledArray) and scheme.chooses_scales(x.scheme):
        scales = numerics.candidate_scales(top, scheme)
        scale = numerics.better_scale(scales, [numerics.largest_error(values, scale, scheme) for scale in scales])
    else:
        scale = numerics.compute_scale(top, scheme)
    q = numerics.quantize_with_scale(values, scale, scheme)
    return _bits(q.data), q.scale, top


@functools.partial(_compiled, static_argnames="scheme")
def quantized_finite(
    x: Array | ScaledArray, scratch: UInt8[Array, "n k"], scheme: Scheme
) -> tuple[UInt8[Array, "n k"], Array]:
    """`quantized` by the finite values alone, where NaN and Inf are allowed."""
    is_scaled = isinstance(x, ScaledArray)
    q = numerics.requantize(x, scheme) if is_scaled else numerics.quantize(x, scheme)
    return _bits(q.data), q.scale


@functools.partial(_compiled, static_argnames="scheme")
def quantized_with_scale(
    x: Array | ScaledArray, scale: Float[Array, "1 c"], scratch: UInt8[Array, "n k"], scheme: Scheme
) -> UInt8[Array, "n k"]:
    """The data of `x` (as bytes) with the scales of the whole matrix."""
    return _bits(numerics.quantize_with_scale(_values(x), scale, scheme).data)


@functools.partial(_compiled, static_argnames="dtype")
def dequantized(x: ScaledArray, scratch: UInt[Array, "n k"], dtype: np.dtype) -> UInt[Array, "n k"]:
    """The bits of `x` in 16 or 32 bits."""
    return _bits(x.dequantize(dtype))


@functools.partial(jax.jit, static_argnames="scheme")
def block_max(x: Array | ScaledArray, scheme: Scheme) -> Float[Array, "1 c"]:
    """Of blocks that go on in other rows; Inf or NaN where one holds it."""
    return numerics.block_max(_values(x), scheme)


@functools.partial(jax.jit, static_argnames="scheme")
def block_amax(x: Array | ScaledArray, scheme: Scheme) -> Float[Array, "1 c"]:
    return numerics.block_amax(_values(x), scheme)


@functools.partial(jax.jit, static_argnames="scheme")
def candidate_scales(amax: Float[Array, "1 c"], scheme: Scheme) -> tuple[Float[Array, "1 c"], Float[Array, "1 c"]]:
    return numerics.candidate_scales(amax, scheme)


@functools.partial(jax.jit, static_argnames="scheme")
def largest_errors(x: ScaledArray, scales: Sequence[Float[Array, "1 c"]], scheme: Scheme) -> list[Float[Array, "1 c"]]:
    """Of blocks that go on in other rows, by each of these scales."""
    values = _values(x)
    return [numerics.largest_error(values, scale, scheme) for scale in scales]


better_scale = jax.jit(numerics.better_scale)


@functools.partial(jax.jit, static_argnames="scheme")
def compute_scale(amax: Float[Array, "1 c"], scheme: Scheme) -> Float[Array, "1 c"]:
    return numerics.compute_scale(amax, scheme)


@_compiled
def in_float32(
    x: Array | ScaledArray, truth: Array | ScaledArray, scratch: tuple[Float[Array, "n k"], Float[Array, "n k"]]
) -> tuple[Float[Array, "n k"], Float[Array, "n k"]]:
    """What both stand for."""
    return _float32(x), _float32(truth)


@jax.jit
def block_tops(x: ScaledArray) -> Float[Array, "r c"]:
    """The largest magnitude of every block, dequantized; Inf or NaN where one is: a product rises with its factor."""
    # Fused with what follows, XLA's CPU backend reduces a number at a time: 6 times slower.
    tops = jax.lax.optimization_barrier(numerics.block_max(x.data, x.scheme))
    if not x.scheme.is_mx:
        return tops * x.scale
    half, power = numerics.factors_of_byte(_bits(x.scale))
    return (tops * half) * power


@jax.jit
def finite_amax(x: Array | ScaledArray) -> Float[Array, ""]:
    """The largest finite magnitude."""
    values = jnp.abs(_float32(x))
    return jnp.max(jnp.where(jnp.isfinite(values), values, 0), initial=0)


@jax.jit
def count_nonfinite(x: Array | ScaledArray) -> Array:
    return jnp.sum(~jnp.isfinite(_values(x)))


def _values(x: Array | ScaledArray) -> Float[Array, "n k"]:
    return x.dequantize() if isinstance(x, ScaledArray) else x


def _float32(x: Array | ScaledArray) -> Float[Array, "n k"]:
    values = _values(x)
    if values.dtype != jnp.bfloat16:
        return values.astype(jnp.float32)
    # XLA's CPU backend converts it element by element; a shift is vectorized.
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits(x: Array) -> UInt[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
