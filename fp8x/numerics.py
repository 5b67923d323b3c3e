"""Amax, scale rules, quantize, dequantize: pure jnp over blocks. docs/numerics.md explains each choice.

Everything is computed in float32, and eager and jit agree bit for bit: scales come from multiplications by constants
and from bit arithmetic, never from a division by a constant (XLA turns those into multiplications in some contexts
and not in others), `log2` (off by one ulp at powers of two) or a cast to e8m0 (rounds to nearest, turns 0 into NaN).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from fp8x import meshes
from fp8x.array import ScaledArray
from fp8x.errors import RecipeError, ShapeError
from fp8x.scheme import ELEMENTS, MIN_SCALE, Scheme

# The fields of a float32, as int32.
_SIGN, _EXPONENT, _MANTISSA = np.int32(-(2**31)), np.int32(0x7F800000), np.int32(0x007FFFFF)
_LANES = 64

# What `better_scale` asks of amax / max. The ratio is none of small integers: both scales often hold the same number
# nearest to a value, or numbers in such a ratio from it, and of equals which one is taken is no matter of a last bit.
CLEARLY_LESS = np.float32(0.71)
# From here on no product of a code with a part of the scale's bits (2^-16 * 2^-23 of it, e5m2) is subnormal. XLA on CPU
# takes a subnormal product for zero, but not the one within a multiply-add.
MIN_CHOSEN_SCALE = np.float32(2.0**-87)


def quantize(x: Float[Array, "..."], scheme: Scheme, *, name: str = "x") -> ScaledArray:
    """Quantizes `x` by the amax of its own blocks.

    `q = cast(clip(x * 1/s, ±max))` in float32 from the scale as stored, rounding to nearest even. NaN stays NaN,
    ±Inf becomes ±max (as `cvt.satfinite` does); neither enters an amax.

    Raises:
        ShapeError: `x` has too few dims for the block, or an MX scheme meets a ragged dim; `name` is in the message.
    """
    return _quantize(jnp.asarray(x), scheme, name, lambda x: compute_scale(block_amax(x, scheme), scheme))


def requantize(q: ScaledArray, scheme: Scheme, *, name: str = "q") -> ScaledArray:
    """`quantize` of what `q` stands for; but from scales that are powers of two (e8m0, `"pow2"`, `"unit"`) to `"amax"`
    ones, each block has for its scale the smallest power of two that clips none of its values, unless amax / max is
    clearly better (`better_scale`). The result is an ordinary array of the scheme: scales are data.

    Raises:
        ShapeError: as `quantize`.
    """

    def scale_of(x):
        scales = candidate_scales(block_amax(x, scheme), scheme)
        return better_scale(scales, [largest_error(x, scale, scheme) for scale in scales])

    if not scheme.chooses_scales(q.scheme):
        return quantize(dequantize(q), scheme, name=name)
    return _quantize(dequantize(q), scheme, name, scale_of)


def _quantize(x: Float[Array, "..."], scheme: Scheme, name: str, scale_of: Callable[[Array], Array]) -> ScaledArray:
    _check_input(x, scheme, name)

    def by_own_scale(x):
        scale = scale_of(x)
        return [_codes(x, scale, scheme), scale]

    return ScaledArray(*meshes.by_xla(by_own_scale, lambda: _dims(x, scheme), x), scheme)


def quantize_with_scale(x: Float[Array, "..."], scale: Float[Array, "..."], scheme: Scheme) -> ScaledArray:
    """Quantizes `x` with scales that are already known (a calibrated activation scale, say).

    Raises:
        ShapeError: `scale` is not of the type and shape that `scheme` gives `x`.
    """
    # The invariants, before anything is computed from a scale that does not meet them.
    ScaledArray(jax.ShapeDtypeStruct(x.shape, scheme.dtype), scale, scheme)
    codes = functools.partial(_codes, scheme=scheme)
    return ScaledArray(meshes.by_xla(codes, lambda: meshes.explicit_dims(x), x, scale), scale, scheme)


def _codes(x: Float[Array, "..."], scale: Float[Array, "..."], scheme: Scheme) -> Float[Array, "..."]:
    limit = np.float32(scheme.max)
    return _cast(jnp.clip(_divided(x, scale, scheme), -limit, limit), scheme)


def _dims(x: Float[Array, "..."], scheme: Scheme) -> list[tuple[meshes.Axes, ...]]:
    """How codes and scales lie of an `x` on an Explicit mesh."""
    dims = meshes.explicit_dims(x)
    return [dims, meshes.scale_dims(dims, scheme, x.shape, meshes.explicit_mesh(x))]


def is_clipped(x: Float[Array, "..."], scale: Float[Array, "..."], scheme: Scheme) -> Bool[Array, "..."]:
    """Where `quantize_with_scale` clips."""

    def is_over(x, scale):
        return jnp.abs(_divided(x, scale, scheme)) > np.float32(scheme.max)

    return meshes.by_xla(is_over, lambda: meshes.explicit_dims(x), x, scale)


def quantize_weight(
    w: Float[Array, "..."],
    scheme: Scheme,
    *,
    name: str,
    allow_nonfinite: bool = False,
    to_weight: Callable[[Array], Array] | None = None,
) -> ScaledArray:
    """`quantize`, compiled, for a weight: refuses NaN and Inf, which in a trained matrix mean a broken checkpoint.

    Arguments:
        w: the weight `[..., N, K]`, or what `to_weight` makes it of, without a copy of its own where XLA can do so.
        scheme: how it is stored.
        name: stands in errors.
        allow_nonfinite: NaN stays NaN, Inf becomes the largest finite value.
        to_weight: a hashable function.

    Raises:
        ShapeError: as `quantize`; or `w` holds NaN or Inf, not allowed: the message has name and count.
    """
    _check_input(w if to_weight is None else jax.eval_shape(to_weight, w), scheme, name)
    if not allow_nonfinite:
        check_finite(w, name)
    return _quantize_weight(w, scheme, to_weight)


def check_finite(w: Float[Array, "..."], name: str) -> None:
    """Raises a ShapeError, with name and count, for a weight that holds NaN or Inf; a traced one passes."""
    if not isinstance(w, jax.core.Tracer | jax.ShapeDtypeStruct) and (count := int(_count_nonfinite(w))):
        raise ShapeError(
            f"{name}: holds {count} NaN or Inf of {w.size} values; mend the weights, or pass allow_nonfinite=True "
            "(--allow-nonfinite): NaN stays NaN, Inf becomes the largest finite value"
        )


def _check_input(x: Float[Array, "..."], scheme: Scheme, name: str) -> None:
    if not isinstance(scheme, Scheme):
        raise RecipeError(f"scheme: {scheme!r} is no Scheme; use one like Scheme('e4m3', block=(128, 128))")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(f"{name}: dtype is {x.dtype}; quantize takes a floating-point array")
    scheme.check_shape(x.shape, name)


@jax.jit
def _count_nonfinite(w: Float[Array, "..."]) -> Array:
    return jnp.sum(~jnp.isfinite(w))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_weight(w: Float[Array, "..."], scheme: Scheme, to_weight: Callable[[Array], Array] | None) -> ScaledArray:
    return quantize(w if to_weight is None else to_weight(w), scheme)


def dequantize(q: ScaledArray, dtype=jnp.float32) -> Float[Array, "..."]:
    """`data * scale` in float32, cast once to `dtype`."""

    def multiply(data, scale):
        data = data.astype(jnp.float32)
        if not q.scheme.is_mx:
            return rounded((data * _expand(scale, data.shape, q.scheme)).astype(dtype))
        half, power = (_expand(factor, data.shape, q.scheme) for factor in factors_of_byte(_byte(scale)))
        return rounded(((data * half) * power).astype(dtype))

    return meshes.by_xla(multiply, lambda: meshes.explicit_dims(q.data), q.data, q.scale)


def factors_of_byte(byte: Int[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """What an e8m0 byte means, as two factors: 2^-127 (byte 0) is subnormal in float32, which XLA flushes on CPU."""
    half = jnp.where(byte == 0, np.float32(0.5), np.float32(1.0))
    return half, jnp.where(byte == 255, np.float32(np.nan), _power_of_two(jnp.maximum(byte, 1)))


def block_amax(x: Float[Array, "..."], scheme: Scheme) -> Float[Array, "..."]:
    """The largest finite magnitude of every block, float32, in the shape of the scales. 0 for an empty block."""
    return meshes.by_xla(lambda x: _block_max(x, scheme, finite=True), lambda: _dims(x, scheme)[1], x)


def block_max(x: Float[Array, "..."], scheme: Scheme) -> Float[Array, "..."]:
    """`block_amax`, but Inf or NaN for a block that holds one: cheaper, and shows whether one is there."""
    return _block_max(x, scheme, finite=False)


def _block_max(x: Float[Array, "..."], scheme: Scheme, finite: bool) -> Float[Array, "..."]:
    counts = scheme.scale_shape(x.shape)
    blocks = [b if c > 1 else max(n, 1) for n, b, c in zip(x.shape, scheme.block_of(x.shape), counts)]

    def magnitudes(x):
        # They compare like their bits, and as integers XLA does not flush the subnormal ones.
        integer = np.dtype(f"int{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, integer) & np.iinfo(integer).max
        if finite:
            bits = jnp.where(bits < np.array(np.inf, x.dtype).view(integer), bits, 0)
        bits = jnp.pad(bits, [(0, c * b - n) for n, b, c in zip(bits.shape, blocks, counts)])
        return bits.reshape([extent for pair in zip(counts, blocks) for extent in pair])

    def at_once(x):
        bits = jnp.max(magnitudes(_float32(x)), axis=tuple(range(1, 2 * x.ndim, 2)), initial=0)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def in_steps(x):
        # XLA's CPU backend reduces in whole vectors what lies at least a vector's width apart, best in 16 bits;
        # neighbours only in 32. So over rows, then over strides of a long row, then what is left.
        has_rows = any(block > 1 for block in blocks[:-1])
        is_long = blocks[-1] > 2 * _LANES and blocks[-1] % _LANES == 0
        x = x if (has_rows or is_long) and x.dtype.itemsize <= 4 else _float32(x)
        bits = magnitudes(x)
        bits = jnp.max(bits, axis=tuple(range(1, bits.ndim - 1, 2)), initial=0)
        if is_long:
            bits = jnp.max(bits.reshape(*counts, blocks[-1] // _LANES, _LANES), axis=-2, initial=0)
        bits = jnp.max(bits, axis=-1, initial=0)
        if x.dtype == jnp.bfloat16:
            # The upper half of a float32; a conversion may flush.
            return jax.lax.bitcast_convert_type(bits.astype(jnp.int32) << 16, jnp.float32)
        return jax.lax.bitcast_convert_type(bits, x.dtype).astype(jnp.float32)

    return jax.lax.platform_dependent(x, cpu=in_steps, default=at_once)


def compute_scale(amax: Float[Array, "..."], scheme: Scheme) -> Float[Array, "..."]:
    """The scale that `scheme` gives a block of magnitude `amax` (float32, finite, ≥ 0), in the scheme's scale type.

    float32: `max(amax * f32(1/max), 2^-126)`, and 1 for an all-zero block (DESIGN.md, "Quantizing").
    e8m0, with `amax = m * 2^E`: the exponent `E - emax`, plus one where `m` is beyond what the rule admits
    (OCP Microscaling Formats v1.0, section 6.3, for "floor"; NVIDIA's PTX `cvt.rp.satfinite.ue8m0x2` for "rceil").
    """
    amax = amax.astype(jnp.float32)
    if scheme.is_mx:
        return _e8m0_scale(amax, scheme)
    if scheme.scale_rule == "unit":
        return jnp.ones_like(amax)
    scale = jnp.maximum(amax * np.float32(1.0 / scheme.max), MIN_SCALE)
    if scheme.scale_rule == "pow2":
        bits = jax.lax.bitcast_convert_type(scale, jnp.uint32)
        # Adding all ones below the exponent carries into it unless the mantissa is zero: the next power of two.
        bits = (bits + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)
        scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jax.lax.bitcast_convert_type(amax, jnp.int32) == 0, np.float32(1.0), scale)


def candidate_scales(amax: Float[Array, "..."], scheme: Scheme) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The two float32 scales of which `better_scale` takes one: that of `"pow2"`, and that of the scheme's own rule."""
    return compute_scale(amax, dataclasses.replace(scheme, scale_rule="pow2")), compute_scale(amax, scheme)


def largest_error(x: Float[Array, "..."], scale: Float[Array, "..."], scheme: Scheme) -> Float[Array, "..."]:
    """Of every block: the largest `|code * scale - x|` over its finite values, quantized by these float32 scales;
    float32, in the shape of the scales.

    Like an amax, a block's is the largest of its parts', if all of these are given the whole block's scale. What a
    compiler does about fusing has no part in it, for scales from `MIN_CHOSEN_SCALE` on.
    """

    def errors(x, scale):
        x, codes = _float32(x), _codes(x, scale, scheme).astype(jnp.float32)
        # A product with half of a scale's 24 bits is exact. So a multiply-add of it, which XLA makes in one context and
        # not in another, rounds where the multiplication and the addition do.
        upper = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(scale, jnp.int32) & -(2**12), jnp.float32)
        upper, lower = (_expand(part, x.shape, scheme) for part in (upper, scale - upper))
        error = jnp.where(jnp.isfinite(x), (codes * upper - x) + codes * lower, 0)
        return _block_max(error, scheme, finite=False)

    return meshes.by_xla(errors, lambda: _dims(x, scheme)[1], x, scale)


def better_scale(scales: Sequence[Float[Array, "..."]], errors: Sequence[Float[Array, "..."]]) -> Float[Array, "..."]:
    """Of every block the first of its `candidate_scales`, a power of two, unless the `largest_error` by the other is
    less by 3 dB: of equals the one by which most values are exact."""
    (pow2, own), (of_pow2, of_own) = scales, errors
    return jnp.where((of_own < CLEARLY_LESS * of_pow2) & (own >= MIN_CHOSEN_SCALE), own, pow2)


def _e8m0_scale(amax: Float[Array, "..."], scheme: Scheme) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(e8m0_byte(amax, scheme).astype(jnp.uint8), scheme.scale_dtype)


def e8m0_byte(amax: Float[Array, "..."], scheme: Scheme) -> Int[Array, "..."]:
    """The e8m0 scale of `compute_scale` as int32: what a kernel, without e8m0 registers, computes with."""
    element = ELEMENTS[scheme.element]
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    exponent, mantissa = bits >> 23, bits & _MANTISSA
    beyond = {
        "floor": jnp.zeros_like(mantissa),
        "rceil": mantissa > _mantissa_field(element.max_mantissa),
        "ceil": mantissa > 0,
        # Rounding amax to the element's mantissa carries into the exponent from here on.
        "even": mantissa >= _mantissa_field(2.0 - 2.0 ** -(element.mantissa_bits + 1)),
    }[scheme.scale_rule]
    return jnp.clip(exponent - element.emax + beyond.astype(jnp.int32), 0, 254)


def _mantissa_field(mantissa: float) -> int:
    """The 23 stored bits of a mantissa in [1, 2)."""
    return int((mantissa - 1.0) * 2**23)


def _byte(scale: Float[Array, "..."]) -> UInt8[Array, "..."]:
    return jax.lax.bitcast_convert_type(scale, jnp.uint8)


def _power_of_two(biased_exponent: Array) -> Float[Array, "..."]:
    """`2^(b-127)` for a biased exponent 1 ≤ b ≤ 254, built from bits."""
    return jax.lax.bitcast_convert_type(biased_exponent.astype(jnp.uint32) << 23, jnp.float32)


def _inverse(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / scale` in float32. e8m0: from bits, since XLA flushes 2^-127 on CPU and 1/0 would be Inf."""
    if scale.dtype == jnp.float32:
        # XLA's GPU backend divides by an approximation (PTX `rcp.approx`), which may be off by a last bit.
        return jax.lax.platform_dependent(scale, cpu=lambda scale: np.float32(1.0) / scale, default=reciprocal)
    return reciprocal_of_byte(_byte(scale).astype(jnp.int32))


def reciprocal_of_byte(byte: Int[Array, "..."]) -> Float[Array, "..."]:
    """`1 / scale` of an e8m0 byte."""
    # Bytes 254 and 255 (2^127, NaN) have no normal reciprocal; amax / max never reaches either.
    return jnp.where(
        byte < 254,
        _power_of_two(jnp.maximum(254 - byte, 1)),
        jnp.where(byte == 254, np.float32(0.0), np.float32(np.nan)),
    )


def reciprocal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / x` in float32, rounded to nearest, by integer arithmetic alone: what every processor gives.

    As where XLA flushes subnormals: of a subnormal or zero it is Inf, and where it would be subnormal itself, zero.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent, mantissa = (bits & _EXPONENT) >> 23, (bits & _MANTISSA | 2**23).astype(jnp.uint32)
    # 2^47 / mantissa, 24 bits of it, by long division in digits of 8 bits. It is never halfway between two integers:
    # an odd number times a mantissa is no power of two.
    quotient, rest = jnp.zeros_like(mantissa), np.uint32(2**23)
    for _ in range(3):
        digit, rest = (rest << 8) // mantissa, (rest << 8) % mantissa
        quotient = (quotient << 8) + digit
    quotient += (2 * rest >= mantissa).astype(jnp.uint32)
    # The quotient's leading bit adds one to the exponent; that of a power of two lies a bit further up, and adds two.
    result = ((252 - exponent) << 23) + quotient.astype(jnp.int32)
    result = jnp.where(jnp.abs(x) > np.float32(2.0**126), 0, result)
    result = jnp.where(exponent == 0, _EXPONENT, result)
    result = jax.lax.bitcast_convert_type(result | (bits & _SIGN), jnp.float32)
    return jnp.where(jnp.isnan(x), x, result)


def _cast(y: Float[Array, "..."], scheme: Scheme) -> Float[Array, "..."]:
    """Finite values within ±max, or NaN, to 8 bits; to nearest even."""
    # XLA's CPU backend converts element by element; the same in integer arithmetic is vectorized, and 3 times faster.
    # Elsewhere XLA takes float32 → float8 → float32 for nothing, unless it can't see both conversions at once.
    return jax.lax.platform_dependent(
        y,
        cpu=functools.partial(_cast_by_bits, scheme=scheme),
        default=lambda y: jax.lax.optimization_barrier(y.astype(scheme.dtype)),
    )


def _cast_by_bits(y: Float[Array, "..."], scheme: Scheme) -> Float[Array, "..."]:
    element, info = ELEMENTS[scheme.element], jnp.finfo(scheme.dtype)
    bits = jax.lax.bitcast_convert_type(y, jnp.int32)
    magnitude = bits & ~_SIGN
    # Adding half of what is dropped, less one where the last bit kept is even, carries upwards where it rounds up.
    dropped = 23 - element.mantissa_bits
    even = (magnitude >> dropped) & 1
    normal = ((magnitude + (even + np.int32(2 ** (dropped - 1) - 1))) >> dropped) - np.int32(
        (126 + info.minexp) << element.mantissa_bits
    )
    # A float32 whose last bit weighs as much as the smallest subnormal: the addition rounds.
    shift = np.float32(info.smallest_subnormal) * np.float32(2.0**23)
    shifted = jax.lax.bitcast_convert_type(magnitude, jnp.float32) + shift
    subnormal = jax.lax.bitcast_convert_type(shifted, jnp.int32) - shift.view(np.int32)
    code = jnp.where(magnitude < np.int32((127 + info.minexp) << 23), subnormal, normal)
    code = jnp.where(magnitude > _EXPONENT, np.array(np.nan, scheme.dtype).view(np.uint8).astype(np.int32) & 0x7F, code)
    return jax.lax.bitcast_convert_type((code | ((bits >> 24) & 0x80)).astype(jnp.uint8), scheme.dtype)


def rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, a result that was just cast to 16 bits, so that what is computed from it starts from the rounded numbers.

    Inside jit XLA skips the rounding of a result that is cast up again at once ("excess precision", on GPUs for every
    type). Used wherever a contract names a rounding and arithmetic follows. On CPU `x` goes on as it is: there XLA does
    so with bfloat16 alone, and `_float32` meets it.
    """
    if x.dtype.itemsize != 2:
        return x
    return jax.lax.platform_dependent(x, cpu=lambda x: x, default=jax.lax.optimization_barrier)


def _float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` in float32, with no more mantissa than its own type has.

    A scale and an element made from a number that XLA did not round to bfloat16 (see `rounded`) would differ from those
    that eager execution finds. float16 has a shorter exponent too, which `reduce_precision` does not keep to.
    """
    x = rounded(x) if x.dtype == jnp.float16 else x
    mantissa_bits = min(jnp.finfo(x.dtype).nmant, jnp.finfo(jnp.float32).nmant)
    return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=mantissa_bits)


def _divided(x: Float[Array, "..."], scale: Float[Array, "..."], scheme: Scheme) -> Float[Array, "..."]:
    """`x * 1/scale` in float32.

    XLA flushes a subnormal `x` on CPU. So it enters by its mantissa, `m * 2^-23`, and the scale takes the 2^-126.
    """
    x, inverse = _float32(x), _expand(_inverse(scale), x.shape, scheme)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    is_subnormal = (bits & _EXPONENT) == 0
    mantissa = (bits & _MANTISSA).astype(jnp.float32) * np.float32(2.0**-23)
    x = jnp.where(is_subnormal, jnp.where(bits < 0, -mantissa, mantissa), x)
    return x * jnp.where(is_subnormal, inverse * np.float32(2.0**-126), inverse)


def _expand(scale: Float[Array, "..."], shape: Sequence[int], scheme: Scheme) -> Float[Array, "..."]:
    """Repeats each scale over its block, cut to `shape`. Dims with one block are left to broadcasting."""
    # A scale that jit closes over is a constant, and XLA multiplies constants with each other first: 2^-1 and 2^-126
    # to a 2^-127 that it flushes, or a user's factor and the scale to a product that rounds in another place.
    scale = jax.lax.optimization_barrier(scale)
    for axis, (n, block) in enumerate(zip(shape, scheme.block_of(shape))):
        if scale.shape[axis] != 1 and block != 1:
            scale = jax.lax.slice_in_dim(jnp.repeat(scale, block, axis=axis), 0, n, axis=axis)
    return scale
