"""The numbers of DESIGN.md, section 2, against ml_dtypes, numpy and exact rational arithmetic."""

import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fp8x
from fp8x.array import ScaledArray
from fp8x.errors import ShapeError
from fp8x.numerics import (
    block_amax,
    compute_scale,
    dequantize,
    is_clipped,
    quantize,
    quantize_weight,
    quantize_with_scale,
    reciprocal,
)
from fp8x.scheme import E8M0, Scheme, mx, per_row, per_tensor

DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
MAX = {"e4m3": 448.0, "e5m2": 57344.0}
EMAX = {"e4m3": 8, "e5m2": 15}
EMIN = {"e4m3": -6, "e5m2": -14}  # of the smallest normal
MANTISSA_BITS = {"e4m3": 3, "e5m2": 2}
F32_MAX = float(np.finfo(np.float32).max)
F32_TINY = 2.0**-126

E8M0_SCHEMES = [
    Scheme(element, block=(1, 32), scale_dtype=E8M0, scale_rule=rule)
    for element, rule in itertools.product(DTYPES, ["rceil", "floor", "ceil", "even"])
]
FLOAT32_SCHEMES = [
    per_tensor(),
    per_row(),
    per_row("e5m2"),
    Scheme("e4m3", block=(1, 128)),
    Scheme("e4m3", block=(128, 128)),
    Scheme("e5m2", block=(16, 40)),
    Scheme("e4m3", block=(None, 128)),
    Scheme("e4m3", block=(1, 32), scale_rule="pow2"),
    Scheme("e5m2", block=(None, None), scale_rule="unit"),
    Scheme("e4m3", block=(None, None), scale_rule="unit"),
]
SCHEMES = FLOAT32_SCHEMES + E8M0_SCHEMES
FEW_SCHEMES = [per_tensor(), Scheme("e5m2", block=(16, 40)), Scheme("e4m3", block=(1, 32), scale_rule="pow2"), mx()]

_quantize = jax.jit(quantize, static_argnums=1)
_dequantize = jax.jit(dequantize, static_argnums=1)
_compute_scale = jax.jit(compute_scale, static_argnums=1)


def e8m0(*bytes_) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(bytes_, jnp.uint8), jnp.float8_e8m0fnu)


def as_bits(x) -> np.ndarray:
    """The bits of an array, every NaN the same one."""
    x = np.asarray(x)
    bits = x.view(f"u{x.dtype.itemsize}")
    return np.where(np.isnan(x.astype(np.float32)), bits.dtype.type(~bits.dtype.type(0)), bits)


def assert_same(actual, expected):
    """Bit for bit, leaf for leaf."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(as_bits(a), as_bits(b))


def saturating_cast(x: np.ndarray, element: str) -> np.ndarray:
    """What `cvt.rn.satfinite` does: ml_dtypes' rounding after a clip."""
    return np.clip(x.astype(np.float32), -MAX[element], MAX[element]).astype(DTYPES[element])


def blocks_of(shape, scheme):
    """For every block: its index among the scales, and its slices of the array."""
    lead = (1,) * (len(shape) - len(scheme.block))
    extents = [n if b is None else b for n, b in zip(shape, lead + scheme.block)]
    counts = [math.ceil(n / b) for n, b in zip(shape, extents)]
    for index in itertools.product(*map(range, counts)):
        yield index, tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, extents))


def scale_as_float64(scale) -> np.ndarray:
    """Scales of either type, exactly."""
    if scale.dtype == E8M0:
        byte = np.asarray(scale).view(np.uint8).astype(np.int32)
        return np.where(byte == 255, np.nan, np.ldexp(1.0, byte - 127))
    return np.asarray(scale, np.float64)


def expand(scale: np.ndarray, shape, scheme) -> np.ndarray:
    out = np.empty(shape)
    for index, block in blocks_of(shape, scheme):
        out[block] = scale[index]
    return out


# e8m0 exponents, each by the definition in words, in exact arithmetic.


def floor_log2(x: Fraction) -> int:
    mantissa, exponent = math.frexp(x)  # exact: x is a float32
    assert Fraction(mantissa) * Fraction(2) ** exponent == x
    return exponent - 1


def smallest_power(fits, start: int) -> int:
    """The smallest k such that `fits(k)`, near `start`."""
    return next(k for k in range(start - 4, start + 5) if fits(Fraction(2) ** k))


def rceil_exponent(amax: Fraction, element: str) -> int:
    """The smallest scale under which amax does not exceed the largest element."""
    largest = Fraction(MAX[element])
    return smallest_power(lambda scale: amax / scale <= largest, floor_log2(amax) - EMAX[element])


def floor_exponent(amax: Fraction, element: str) -> int:
    """OCP MX v1.0, 6.3: the largest power of two in amax, over the largest power of two in the element type."""
    return floor_log2(amax) - EMAX[element]


def ceil_exponent(amax: Fraction, element: str) -> int:
    """amax rounded up to a power of two, over the largest power of two in the element type."""
    return smallest_power(lambda power: power >= amax, floor_log2(amax)) - EMAX[element]


def even_exponent(amax: Fraction, element: str) -> int:
    """amax rounded to nearest even with the element's mantissa bits, then floor."""
    ulp = Fraction(2) ** (floor_log2(amax) - MANTISSA_BITS[element])
    return floor_log2(round(amax / ulp) * ulp) - EMAX[element]  # Python's round is to nearest even


E8M0_ORACLES = {"rceil": rceil_exponent, "floor": floor_exponent, "ceil": ceil_exponent, "even": even_exponent}


def amaxes() -> np.ndarray:
    """Float32s of every exponent, subnormal too, with mantissas at and one ulp beside every threshold of every rule."""
    marks = np.float32([1.0, 1.25, 1.5, 1.75, 1.875, 1.9375])
    mantissas = np.concatenate([marks, np.nextafter(marks, np.float32(4)), np.nextafter(marks, np.float32(1))])
    mantissas = np.append(np.unique(mantissas), np.nextafter(np.float32(2), np.float32(0)))
    subnormals = np.float32(2.0**-149) * np.float32([1, 2, 3, 2**22, 2**22 + 1, 2**23 - 1])
    return np.concatenate([np.ldexp(m, np.arange(-126, 128)).astype(np.float32) for m in mantissas] + [subnormals])


class TestElements:
    """Casts and codes: ml_dtypes is the truth."""

    @pytest.mark.parametrize("element", DTYPES)
    def test_every_code_dequantizes(self, element):
        codes = np.arange(256, dtype=np.uint8).view(DTYPES[element])
        q = ScaledArray(jnp.asarray(codes), jnp.ones((1,), jnp.float32), Scheme(element, block=(None,)))
        assert_same(q.dequantize(), codes.astype(np.float32))
        assert_same(q.dequantize(jnp.bfloat16), codes.astype(ml_dtypes.bfloat16))
        assert_same(q.dequantize(jnp.float16), codes.astype(np.float16))

    @pytest.mark.parametrize("element", DTYPES)
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_every_code_quantizes_to_itself(self, element, dtype):
        codes = np.arange(256, dtype=np.uint8).view(DTYPES[element])
        q = quantize(jnp.asarray(codes.astype(np.float32), dtype), Scheme(element, block=(None,), scale_rule="unit"))
        finite_or_nan = ~np.isinf(codes.astype(np.float32))
        assert_same(np.asarray(q.data)[finite_or_nan], codes[finite_or_nan])

    @pytest.mark.parametrize("element", DTYPES)
    @pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
    @pytest.mark.parametrize("log2_scale", [0, -3, 10])
    def test_every_16_bit_input(self, element, dtype, log2_scale):
        x = np.arange(65536, dtype=np.uint16).view(dtype)
        scale = np.float32(2.0**log2_scale)
        scheme = Scheme(element, block=(None,))
        q = quantize_with_scale(jnp.asarray(x), jnp.full((1,), scale), scheme)
        with np.errstate(over="ignore", invalid="ignore"):
            assert_same(q.data, saturating_cast(x.astype(np.float32) / scale, element))

    @pytest.mark.parametrize("element", DTYPES)
    @pytest.mark.parametrize("compiled", [False, True])
    def test_float32_rounds_once(self, element, compiled):
        # One ulp beside a tie: a cast by way of float16 would round it to the tie first, and then the wrong way.
        codes = np.arange(256, dtype=np.uint8).view(DTYPES[element]).astype(np.float32)
        values = np.unique(codes[np.isfinite(codes)])
        ties = (values[1:] + values[:-1]) / 2
        x = np.concatenate([values, ties, np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, -np.float32(9e9))])
        scheme = Scheme(element, block=(None,), scale_rule="unit")
        cast = jax.jit(quantize, static_argnums=1) if compiled else quantize
        assert_same(cast(jnp.asarray(x), scheme).data, saturating_cast(x, element))

    def test_saturation_by_hand(self):
        x = jnp.asarray([464.0, 465.0, 1e30, -1e30, np.inf, -np.inf, 448.0, 447.9])
        q = quantize(x, Scheme("e4m3", block=(None,), scale_rule="unit"))
        assert q.dequantize().tolist() == [448.0, 448.0, 448.0, -448.0, 448.0, -448.0, 448.0, 448.0]
        x = jnp.asarray([61440.0, 1e30, -np.inf, 57344.0, 53248.0, 2.0**-16, 2.0**-17, 1.5 * 2.0**-17])
        q = quantize(x, Scheme("e5m2", block=(None,), scale_rule="unit"))
        assert q.dequantize().tolist() == [57344.0, 57344.0, -57344.0, 57344.0, 49152.0, 2.0**-16, 0.0, 2.0**-16]


# amax -> byte, by hand. 448 = 1.75 * 2^8; 57344 = 1.75 * 2^15; byte 127 is the scale 1.
BY_HAND = {
    ("e4m3", "rceil"): {448: 127, 448.00003: 128, 449: 128, 224: 126, 256: 127, 512: 128, 0: 0, 2.0**-126: 0},
    ("e4m3", "floor"): {256: 127, 448: 127, 500: 127, 511.99997: 127, 512: 128, 0: 0, F32_MAX: 246},
    ("e4m3", "ceil"): {256: 127, 256.00003: 128, 448: 128, 500: 128, 512: 128, 0: 0, F32_MAX: 247},
    ("e4m3", "even"): {256: 127, 448: 127, 495.99997: 127, 496: 128, 512: 128, 0: 0, F32_MAX: 247},
    ("e5m2", "rceil"): {57344: 127, 57344.004: 128, 28672: 126, 32768: 127, 65536: 128, 0: 0, F32_MAX: 240},
    ("e5m2", "floor"): {32768: 127, 57344: 127, 65535: 127, 65536: 128, 0: 0, F32_MAX: 239},
    ("e5m2", "ceil"): {32768: 127, 32768.004: 128, 57344: 128, 65536: 128, 0: 0},
    ("e5m2", "even"): {57344: 127, 61439.996: 127, 61440: 128, 65536: 128, 0: 0},
}


class TestScaleRules:
    @pytest.mark.parametrize("scheme", E8M0_SCHEMES, ids=str)
    def test_e8m0_against_exact_arithmetic(self, scheme):
        amax = amaxes()
        oracle = E8M0_ORACLES[scheme.scale_rule]
        expected = [min(max(oracle(Fraction(float(a)), scheme.element), -127), 127) + 127 for a in amax]
        scale = compute_scale(jnp.asarray(amax), scheme)
        assert scale.dtype == E8M0
        np.testing.assert_array_equal(np.asarray(scale).view(np.uint8), expected)
        assert_same(_compute_scale(amax, scheme), scale)

    @pytest.mark.parametrize(("element", "rule"), BY_HAND)
    def test_e8m0_by_hand(self, element, rule):
        scheme = Scheme(element, block=(1, 32), scale_dtype=E8M0, scale_rule=rule)
        table = BY_HAND[element, rule]
        assert len(set(np.float32(list(table)))) == len(table)
        scale = compute_scale(jnp.asarray(list(table), jnp.float32), scheme)
        assert dict(zip(table, np.asarray(scale).view(np.uint8).tolist())) == table

    def test_default_rules(self):
        assert mx().scale_rule == "rceil" and per_tensor().scale_rule == "amax"

    def test_float32_by_hand(self):
        amax = jnp.asarray([448.0, 1.0, 0.0, 448 * 2.0**-126, 447 * 2.0**-126, F32_TINY, F32_MAX])
        expected = np.float32([1.0, 1 / 448, 1.0, F32_TINY, F32_TINY, F32_TINY, F32_MAX * np.float32(1 / 448)])
        np.testing.assert_array_equal(compute_scale(amax, per_tensor()), expected)
        amax = jnp.asarray([57344.0, 28672.0, 0.0])
        assert compute_scale(amax, per_tensor("e5m2")).tolist() == [1.0, 0.5, 1.0]

    @pytest.mark.parametrize("element", DTYPES)
    def test_float32_is_amax_over_max(self, element):
        amax = amaxes()
        amax = amax[amax >= F32_TINY]
        scale = np.asarray(compute_scale(jnp.asarray(amax), per_tensor(element)), np.float64)
        exact = np.maximum(amax.astype(np.float64) / MAX[element], F32_TINY)
        # Two roundings: of 1/MAX, and of the product. Then the reciprocal never overflows.
        assert (np.abs(scale - exact) <= exact * 2.0**-23).all()
        assert np.isfinite(1 / scale.astype(np.float32)).all()

    @pytest.mark.parametrize("element", DTYPES)
    def test_pow2_is_the_next_power_of_two(self, element):
        amax = amaxes()
        amax = amax[amax >= F32_TINY]
        scale = compute_scale(jnp.asarray(amax), Scheme(element, block=(None,), scale_rule="pow2"))
        expected = [max(rceil_exponent(Fraction(float(a)), element), -126) for a in amax]
        np.testing.assert_array_equal(scale, np.ldexp(np.float32(1), expected))

    def test_pow2_by_hand(self):
        scheme = Scheme("e4m3", block=(None,), scale_rule="pow2")
        scale = compute_scale(jnp.float32([448.0, 449.0, 896.0, 224.0, 1.0, 0.0]), scheme)
        assert scale.tolist() == [1.0, 2.0, 2.0, 0.5, 2.0**-8, 1.0]

    def test_unit(self):
        scheme = Scheme("e5m2", block=(None, None), scale_rule="unit")
        assert compute_scale(jnp.float32([[0.0, 3.0], [1e30, 1e-30]]), scheme).tolist() == [[1.0, 1.0], [1.0, 1.0]]

    @settings(max_examples=200, deadline=None)
    @given(amax=st.floats(0, F32_MAX, width=32, allow_subnormal=False))
    def test_any_amax(self, amax):
        for scheme in E8M0_SCHEMES:
            byte = int(np.asarray(_compute_scale(np.float32(amax), scheme)).view(np.uint8))
            exponent = E8M0_ORACLES[scheme.scale_rule](Fraction(amax), scheme.element) if amax else -127
            assert byte - 127 == max(exponent, -127)


class TestAmax:
    @pytest.mark.parametrize("scheme", [*FEW_SCHEMES, per_row(), Scheme("e4m3", block=(None, None, None))], ids=str)
    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
    def test_against_numpy(self, scheme, dtype):
        x = np.random.default_rng(0).standard_normal((3, 50, 192)).astype(dtype)
        amax = jax.jit(block_amax, static_argnums=1)(x, scheme)
        assert amax.dtype == jnp.float32 and amax.shape == scheme.scale_shape(x.shape)
        for index, block in blocks_of(x.shape, scheme):
            assert amax[index] == np.abs(x[block].astype(np.float32)).max()

    def test_looks_at_finite_values_only(self):
        x = jnp.asarray([[1.0, np.nan, -2.0, np.inf], [np.nan, -np.inf, np.nan, np.inf], [-0.0, 0.0, 0.0, 0.0]])
        assert block_amax(x, per_row()).tolist() == [[2.0], [0.0], [0.0]]

    def test_empty_blocks(self):
        assert block_amax(jnp.zeros((0, 4)), per_tensor()).tolist() == [[0.0]]
        assert block_amax(jnp.zeros((0, 4)), per_row()).shape == (0, 1)
        assert block_amax(jnp.zeros((3, 0)), per_row()).tolist() == [[0.0]] * 3
        assert block_amax(jnp.zeros((3, 0)), Scheme("e4m3", block=(1, 128))).shape == (3, 0)


def quantize_in_numpy(x: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """`quantize`, a block at a time in numpy's float32; e8m0 exponents from exact arithmetic."""
    x = x.astype(np.float32)
    scale = np.empty(scheme.scale_shape(x.shape), np.float64)
    data = np.empty(x.shape, scheme.dtype)
    for index, block in blocks_of(x.shape, scheme):
        finite = np.abs(x[block])[np.isfinite(x[block])]
        amax = np.float32(finite.max(initial=0))
        if scheme.is_mx:
            oracle = E8M0_ORACLES[scheme.scale_rule]
            s = 2.0 ** (max(oracle(Fraction(float(amax)), scheme.element), -127) if amax else -127)
        elif scheme.scale_rule == "unit" or amax == 0:
            s = 1.0
        elif scheme.scale_rule == "pow2":
            s = 2.0 ** max(rceil_exponent(Fraction(float(amax)), scheme.element), -126)
        else:
            s = max(amax * np.float32(1 / MAX[scheme.element]), np.float32(F32_TINY))
        scale[index] = s
        inverse = np.float32(1) / np.float32(s) if s >= F32_TINY else np.float32(1 / s)
        data[block] = saturating_cast(x[block] * inverse, scheme.element)
    return data, scale


def random_array(shape, seed=0, dtype=np.float32) -> np.ndarray:
    """Rows of very different magnitudes, as far as `dtype` reaches, some of them zero."""
    rng = np.random.default_rng(seed)
    reach = 3 if dtype == np.float16 else 30
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-reach, reach, (*shape[:-1], 1))
    x[rng.random(shape) < 0.05] = 0
    x[..., -1:, :] = 0
    return x.astype(dtype)


class TestQuantize:
    @pytest.mark.sample
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @pytest.mark.parametrize(
        ("shape", "dtype"), [((130, 160), np.float32), ((40, 96), ml_dtypes.bfloat16), ((40, 96), np.float16)]
    )
    def test_against_numpy(self, scheme, shape, dtype):
        x = random_array(shape, dtype=dtype)
        q = _quantize(x, scheme)
        data, scale = quantize_in_numpy(x, scheme)
        np.testing.assert_array_equal(scale_as_float64(q.scale), scale)
        assert_same(q.data, data)

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_zero_blocks(self, scheme):
        q = _quantize(np.zeros((4, 64), np.float32), scheme)
        assert not np.asarray(q.data).view(np.uint8).any()
        if scheme.is_mx:
            assert not np.asarray(q.scale).view(np.uint8).any()
        else:
            assert (np.asarray(q.scale) == 1.0).all()
        assert not np.asarray(_dequantize(q)).any()

    def test_a_zero_block_beside_others(self):
        x = jnp.zeros((2, 64)).at[0, 40].set(448.0)
        assert np.asarray(quantize(x, mx()).scale).view(np.uint8).tolist() == [[0, 127], [0, 0]]
        assert quantize(x, per_row()).scale.tolist() == [[1.0], [1.0]]
        assert quantize(x * 2, per_row()).scale.tolist() == [[2.0], [1.0]]

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_nonfinite(self, scheme):
        x = np.ones((4, 64), np.float32)
        x[0, :4] = np.nan, np.inf, -np.inf, 3.0
        x[1, :] = np.nan
        x[2, :] = -np.inf
        q = _quantize(x, scheme)
        clean = np.where(np.isfinite(x), x, 0)
        assert_same(q.scale, _quantize(clean, scheme).scale)
        data = np.asarray(q.data, np.float32)
        assert np.isnan(data[0, 0]) and data[0, 1] == scheme.max and data[0, 2] == -scheme.max
        assert np.isnan(data[1]).all() and (data[2] == -scheme.max).all()
        keep = np.isfinite(x)
        assert_same(np.asarray(q.data)[keep], np.asarray(_quantize(clean, scheme).data)[keep])

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_extreme_magnitudes(self, scheme):
        for amax in [F32_TINY, 448 * F32_TINY, 2.0**-119, 2.0**-110, 2.0**127, F32_MAX]:
            x = np.float32(amax) * np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 64)
            x = np.where(np.abs(x) < F32_TINY, 0, x)
            q = _quantize(x, scheme)
            data, scale = quantize_in_numpy(x, scheme)
            np.testing.assert_array_equal(scale_as_float64(q.scale), scale)
            assert_same(q.data, data)

    def test_subnormal_elements(self):
        # Scale 1: what is below the smallest normal, 2^-6, keeps steps of 2^-9; a tie goes to the even code.
        x = jnp.asarray([[448.0, 2.0**-6, 2.0**-7, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 1.01 * 2.0**-10, 2.0**-12]])
        q = quantize(x, per_row())
        assert q.scale.tolist() == [[1.0]]
        assert (q.dequantize() * 512).tolist() == [[448.0 * 512, 8.0, 4.0, 1.0, 0.0, 2.0, 1.0, 0.0]]

    @pytest.mark.parametrize(
        ("scheme", "scale"),
        [(per_row(), 2.0**-126), (Scheme("e4m3", block=(1, None), scale_rule="pow2"), 2.0**-126), (mx(), 2.0**-127)],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
    def test_subnormal_inputs_keep_their_value(self, scheme, scale, dtype):
        # XLA flushes them on CPU as operands. Results below 2^-126 it flushes still, so data is looked at.
        subnormals = np.arange(1, 128, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(dtype)
        x = np.concatenate([subnormals, -subnormals, np.zeros(2, dtype)]).reshape(8, 32)
        q = _quantize(jnp.asarray(x), scheme)
        assert (scale_as_float64(q.scale) == scale).all()
        assert_same(q.data, (x.astype(np.float64) / scale).astype(np.float32).astype(DTYPES["e4m3"]))
        y = np.asarray(_dequantize(q)).astype(np.float64)
        assert (np.abs(y) <= 2.0**-126).all()

    @pytest.mark.parametrize(
        "scheme", [Scheme("e4m3", block=b) for b in [(1, 128), (128, 128), (16, 40), (None, 40)]], ids=str
    )
    def test_ragged_blocks_are_padded_ones(self, scheme):
        x = random_array((131, 257))
        q = _quantize(x, scheme)
        padded = _quantize(np.pad(x, ((0, 125), (0, 127))), scheme)
        assert_same(q.data, padded.data[:131, :257])
        assert_same(q.scale, padded.scale[: q.scale.shape[0], : q.scale.shape[1]])

    @pytest.mark.parametrize("scheme", [*FEW_SCHEMES, per_row()], ids=str)
    @pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (2, 0, 64)])
    def test_empty_arrays(self, scheme, shape):
        q = _quantize(jnp.zeros(shape, jnp.bfloat16), scheme)
        assert q.shape == shape and q.scale.shape == scheme.scale_shape(shape)
        assert q.dequantize(jnp.bfloat16).shape == shape

    def test_experts_have_blocks_of_their_own(self):
        x = jnp.asarray(random_array((4, 40, 64)))
        for scheme in [per_tensor(), per_row(), Scheme("e4m3", block=(128, 128)), mx()]:
            experts = [_quantize(x[e], scheme) for e in range(4)]
            assert_same(_quantize(x, scheme), jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts))
        shared = _quantize(x, Scheme("e4m3", block=(None, None, None)))
        assert shared.scale.shape == (1, 1, 1)
        assert shared.scale[0, 0, 0] == _quantize(x, per_tensor()).scale.max()

    @pytest.mark.parametrize("shape", [(4, 33), (2, 4, 16), (4, 95)])
    def test_mx_refuses_a_ragged_k(self, shape):
        k = shape[-1]
        with pytest.raises(ShapeError, match=rf"layers.0.q_proj: dim {len(shape) - 1} of .* is {k}, .*K % 32 == 0"):
            quantize(jnp.ones(shape), mx(), name="layers.0.q_proj")

    def test_refuses_integers_and_too_few_dims(self):
        with pytest.raises(ShapeError, match="w: dtype is int32"):
            quantize(jnp.ones((2, 2), jnp.int32), per_tensor(), name="w")
        with pytest.raises(ShapeError, match=r"has 1 dims, but block \(None, None\) names 2"):
            quantize(jnp.ones((2,)), per_tensor())

    def test_public_name(self):
        assert fp8x.quantize is quantize


class TestQuantizeWithScale:
    def test_foreign_scale_saturates(self):
        q = quantize_with_scale(jnp.float32([[1.0, 100.0, -100.0, np.nan]]), jnp.full((1, 1), 0.125), per_tensor())
        assert q.dequantize()[0, :3].tolist() == [1.0, 56.0, -56.0] and np.isnan(q.dequantize()[0, 3])

    def test_foreign_e8m0_scale(self):
        x = jnp.full((1, 96), 3.0).at[0, 0].set(1e4)
        q = quantize_with_scale(x, e8m0([127, 130, 255]), mx())
        assert q.dequantize()[0, [0, 1, 32]].tolist() == [448.0, 3.0, 3.0]
        assert np.isnan(q.dequantize()[0, 64:]).all()

    def test_nan_scale_gives_nan(self):
        # The sentinel of a static layer that is not calibrated must not turn into numbers.
        q = quantize_with_scale(jnp.ones((2, 3)), jnp.full((1, 1), np.nan), per_tensor())
        assert np.isnan(np.asarray(q.data, np.float32)).all()

    @pytest.mark.parametrize(
        ("scale", "match"),
        [
            (np.ones((1, 1), np.float16), "dtype is float16"),
            (np.ones((1, 3), np.float32), r"shape is \(1, 3\), but data \(2, 256\) in .* needs \(1, 2\)"),
        ],
    )
    def test_refuses_a_scale_that_does_not_fit(self, scale, match):
        with pytest.raises(ShapeError, match=match):
            quantize_with_scale(jnp.ones((2, 256)), jnp.asarray(scale), Scheme("e4m3", block=(None, 128)))


def test_is_clipped():
    x = jnp.float32([[448.0, 449.0, -np.inf, np.nan], [-897.0, 896.0, 0.0, 1e30]])
    scale = jnp.float32([[1.0], [2.0]])
    clipped = is_clipped(x, scale, per_row())
    assert clipped.tolist() == [[False, True, True, False], [True, False, False, True]]
    data = np.asarray(quantize_with_scale(x, scale, per_row()).data, np.float32)
    assert (np.abs(data[np.asarray(clipped)]) == 448).all()


class TestQuantizeWeight:
    def test_equals_quantize(self):
        w = jnp.asarray(random_array((64, 96)))
        assert_same(quantize_weight(w, mx(), name="w"), _quantize(w, mx()))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_refuses_nonfinite_naming_tensor_and_count(self, bad):
        w = jnp.ones((8, 32)).at[3, :5].set(bad)
        with pytest.raises(ShapeError, match=r"model.layers.0.w: holds 5 NaN or Inf of 256 values.*allow_nonfinite"):
            quantize_weight(w, per_tensor(), name="model.layers.0.w")
        q = quantize_weight(w, per_tensor(), name="w", allow_nonfinite=True)
        assert q.scale[0, 0] == np.float32(1 / 448)

    def test_errors_name_the_tensor(self):
        with pytest.raises(ShapeError, match="embed: dtype is int32"):
            quantize_weight(jnp.ones((2, 32), jnp.int32), mx(), name="embed")
        with pytest.raises(ShapeError, match=r"down_proj: dim 1 .* is 40"):
            quantize_weight(jnp.ones((2, 40)), mx(), name="down_proj")


class TestDequantize:
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_multiplies_by_the_scale(self, scheme):
        q = _quantize(random_array((40, 96)), scheme)
        y = np.asarray(_dequantize(q))
        exact = np.asarray(q.data, np.float64) * expand(scale_as_float64(q.scale), q.shape, scheme)
        with np.errstate(over="ignore"):
            expected = exact.astype(np.float32)
        subnormal = (np.abs(exact) < F32_TINY) & (exact != 0)
        np.testing.assert_array_equal(y[~subnormal], expected[~subnormal])
        assert (np.abs(y[subnormal]) < F32_TINY).all()
        if scheme in FEW_SCHEMES:
            assert_same(_dequantize(q, jnp.bfloat16), y.astype(ml_dtypes.bfloat16))

    @pytest.mark.parametrize("element", DTYPES)
    @pytest.mark.parametrize("context", ["eager", "jit", "scale is a constant", "all is constant"])
    def test_every_byte_and_code(self, element, context):
        codes = np.arange(256, dtype=np.uint8).view(DTYPES[element])
        data = jnp.asarray(np.repeat(codes[None], 256, axis=0))
        scheme = Scheme(element, block=(1, 32), scale_dtype=E8M0)
        scale = e8m0(*np.repeat(np.arange(256)[:, None], 8, axis=1).tolist())
        q = ScaledArray(data, scale, scheme)
        actual = {
            "eager": lambda: dequantize(q),
            "jit": lambda: jax.jit(dequantize)(q),
            "scale is a constant": lambda: jax.jit(lambda d: dequantize(ScaledArray(d, scale, scheme)))(data),
            "all is constant": lambda: jax.jit(lambda: dequantize(q))(),
        }[context]()
        with np.errstate(invalid="ignore", over="ignore"):
            exact = codes.astype(np.float64)[None] * np.where(
                np.arange(256) == 255, np.nan, np.ldexp(1.0, np.arange(256) - 127)
            ).reshape(256, 1)
            expected = exact.astype(np.float32)
        subnormal = (np.abs(exact) < F32_TINY) & (exact != 0)
        np.testing.assert_array_equal(np.asarray(actual)[~subnormal], expected[~subnormal])
        assert ((np.asarray(actual) == expected) | (np.asarray(actual) == 0))[subnormal].all()

    def test_byte_0_is_not_flushed(self):
        # XLA multiplies constants with each other first, and 2^-1 * 2^-126 would be a 2^-127 that it flushes on CPU.
        data, scale = jnp.full((4, 64), 448, jnp.float8_e4m3fn), jnp.broadcast_to(e8m0(0), (4, 2))
        y = jax.jit(lambda data: ScaledArray(data, scale, mx()).dequantize())(data)
        assert (np.asarray(y) == 448 * 2.0**-127).all()

    def test_bytes_by_hand(self):
        data = jnp.full((1, 160), 2.0, jnp.float8_e4m3fn)
        y = ScaledArray(data, e8m0([0, 127, 128, 254, 255]), mx()).dequantize()[0, ::32]
        assert y[:3].tolist() == [2.0**-126, 2.0, 4.0] and np.isposinf(y[3]) and np.isnan(y[4])
        zeros = ScaledArray(data * 0, e8m0([0, 127, 128, 254, 255]), mx()).dequantize()[0, ::32]
        assert zeros[:4].tolist() == [0.0] * 4 and np.isnan(zeros[4])

    @settings(max_examples=50, deadline=None)
    @given(
        scale=hnp.arrays(np.float32, (2, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False))
    )
    def test_foreign_float32_scales(self, scale):
        scheme = Scheme("e4m3", block=(4, 5))
        codes = np.arange(7 * 14, dtype=np.uint8).reshape(7, 14).view(DTYPES["e4m3"])
        y = _dequantize(ScaledArray(jnp.asarray(codes), jnp.asarray(scale), scheme))
        exact = codes.astype(np.float64) * expand(scale, codes.shape, scheme)
        normal = np.abs(exact) >= F32_TINY
        np.testing.assert_array_equal(np.asarray(y)[normal], exact.astype(np.float32)[normal])

    def test_e4m3_times_a_power_of_two_is_exact_in_bf16(self):
        codes = np.arange(256, dtype=np.uint8)
        codes = jnp.asarray(codes[(codes & 0x7F) != 0x7F].view(DTYPES["e4m3"]))
        data = jnp.pad(codes, (0, 2))[None]
        for byte in [20, 100, 127, 140, 240]:
            q = ScaledArray(data, e8m0([byte] * 8), mx())
            np.testing.assert_array_equal(np.asarray(q.dequantize(jnp.bfloat16), np.float32), q.dequantize())

    def test_casts_once(self):
        # 1.0625 * (1 + 2^-8): in bf16 a tie for a double rounding, not for a single one.
        q = ScaledArray(jnp.full((1, 1), 1.125, jnp.float8_e4m3fn), jnp.full((1, 1), 1.00390625 + 2**-20), per_tensor())
        expected = (np.float32(1.125) * np.float32(1.00390625 + 2**-20)).astype(ml_dtypes.bfloat16)
        assert q.dequantize(jnp.bfloat16)[0, 0] == expected
        assert q.dequantize(jnp.float16).dtype == jnp.float16


class TestEagerEqualsJit:
    """Bit for bit, whatever surrounds the call."""

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_alone(self, scheme):
        for seed in range(4):
            x = jnp.asarray(random_array((40, 96), seed))
            x = x.at[0].set(jnp.float32(F32_MAX)).at[1, :40].set(2.0**-126).at[2].set(2.0**-120)
            q = quantize(x, scheme)
            assert_same(_quantize(x, scheme), q)
            assert_same(_dequantize(q), dequantize(q))

    @pytest.mark.sample
    @pytest.mark.parametrize("scheme", FEW_SCHEMES, ids=str)
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_inside_a_bigger_jit(self, scheme, dtype):
        # Each producer rounds once, to `dtype`, in eager; in jit XLA would hand on what it has before the rounding.
        def layer(x, y):
            return quantize(x * y, scheme), quantize(jnp.maximum(x, 0) * 3, scheme), quantize(x + y, scheme)

        rng = np.random.default_rng(1)
        x, y = (jnp.asarray(rng.standard_normal((40, 96)), dtype) for _ in "xy")
        assert_same(jax.jit(layer)(x, y), layer(x, y))

    @pytest.mark.parametrize("scheme", FEW_SCHEMES, ids=str)
    def test_constants_are_not_merged(self, scheme):
        x = jnp.asarray(np.random.default_rng(3).standard_normal((40, 96)), jnp.float32)
        q = quantize(x, scheme)

        def scaled(data):
            return dequantize(ScaledArray(data, q.scale, scheme)) * 3.1

        def requantized(x):
            return quantize_with_scale(x * 3.1, q.scale, scheme)

        assert_same(jax.jit(scaled)(q.data), scaled(q.data))
        assert_same(jax.jit(requantized)(x), requantized(x))
        assert_same(jax.jit(lambda: quantize(x, scheme))(), q)
        assert_same(jax.jit(lambda: dequantize(q))(), dequantize(q))

    @pytest.mark.parametrize("scheme", FEW_SCHEMES, ids=str)
    def test_round_trip_through_16_bits(self, scheme):
        def fake_quantize_twice(x):
            return quantize(quantize(x, scheme).dequantize(jnp.bfloat16), scheme)

        x = jnp.asarray(random_array((40, 96)))
        assert_same(jax.jit(fake_quantize_twice)(x), fake_quantize_twice(x))

    @pytest.mark.parametrize("scheme", [per_row(), mx()], ids=str)
    def test_vmap_and_scan(self, scheme):
        x = jnp.asarray(random_array((3, 8, 64)))
        whole = _quantize(x, scheme)
        one = functools.partial(quantize, scheme=scheme)
        assert_same(jax.jit(jax.vmap(one))(x), whole)
        assert_same(jax.jit(jax.vmap(one, in_axes=1, out_axes=1))(x.swapaxes(0, 1)).data, whole.data.swapaxes(0, 1))
        assert_same(jax.lax.scan(lambda carry, row: (carry, one(row)), 0, x)[1], whole)
        assert_same(jax.jit(jax.vmap(dequantize))(whole), _dequantize(whole))


class TestOtherProcessors:
    """What is computed where XLA's CPU backend isn't: here by the same backend, in their place."""

    @pytest.mark.sample
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_same_bits(self, scheme, monkeypatch):
        x = (
            jnp.asarray(random_array((40, 1280), dtype=jnp.bfloat16))
            .at[3, 5:9]
            .set(np.nan)
            .at[4]
            .set(0)
            .at[5, 0]
            .set(np.inf)
        )
        expected = quantize(x, scheme)
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))
        assert_same(jax.jit(lambda x: quantize(x, scheme))(x), expected)

    def test_reciprocal_is_rounded_to_nearest(self):
        mantissas = np.arange(2**23, dtype=np.int32)
        for exponent in (1, 127, 252):
            x = (mantissas | exponent << 23).view(np.float32)
            np.testing.assert_array_equal(jax.jit(reciprocal)(x), np.float32(1) / x)
        ends = np.float32(
            [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**126, -(2.0**126), F32_MAX, -3.0, 2.0**-126, 2.0**-127]
        )
        expected = [
            np.inf,
            -np.inf,
            0.0,
            -0.0,
            np.nan,
            2.0**-126,
            -(2.0**-126),
            0.0,
            -np.float32(1 / 3),
            2.0**126,
            np.inf,
        ]
        assert_same(np.asarray(reciprocal(ends)), np.float32(expected))


# Error bounds. With v = |x| / scale, an element type of p mantissa bits, emin its smallest normal exponent:
#   normal     half an ulp, 2^(floor(log2 v) - p - 1), at most 2^-(p+1) of v
#   subnormal  half a step, 2^(emin - p - 1)
#   saturated  v - max, which only "floor", "even" and "unit" admit
# in units of the scale; float32 scales add the roundings of 1/s, x * 1/s and data * s: three of 2^-24.


def error_bound(x: np.ndarray, scale: np.ndarray, scheme: Scheme) -> np.ndarray:
    p, emin = MANTISSA_BITS[scheme.element], EMIN[scheme.element]
    v = np.abs(x) / scale
    half_ulp = np.exp2(np.maximum(np.floor(np.log2(np.maximum(v, 2.0**emin))), emin) - p - 1)
    bound = scale * np.where(v > MAX[scheme.element], np.maximum(v - MAX[scheme.element], half_ulp), half_ulp)
    exact = scheme.is_mx or scheme.scale_rule in ("pow2", "unit")
    # What XLA flushes on CPU: inputs and results below the smallest normal float32.
    return bound + (0 if exact else np.abs(x) * 3 * 2.0**-24) + F32_TINY


def largest_scaled(scheme: Scheme) -> float:
    """How large an element can be before the clip, by rule."""
    beyond = {"floor": 2.0, "even": 2 - 2.0 ** -(MANTISSA_BITS[scheme.element] + 1), "unit": np.inf}
    if scheme.scale_rule in beyond:
        return beyond[scheme.scale_rule] * 2.0 ** EMAX[scheme.element]
    return MAX[scheme.element] * (1 if scheme.is_mx or scheme.scale_rule == "pow2" else 1 + 2.0**-22)


ARRAYS = hnp.arrays(
    np.float32,
    (4, 64),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
    | st.floats(-448, 448, width=32, allow_subnormal=False)
    | st.sampled_from([0.0, 1.0, 448.0, 449.0, 57344.0, 1.75, 1.875, 1.9375, F32_TINY, -F32_MAX]),
)


class TestProperties:
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @settings(max_examples=40, deadline=None)
    @given(x=ARRAYS)
    def test_error_bound(self, scheme, x):
        self.check(x, scheme)

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_error_bound_of_rows_of_every_magnitude(self, scheme):
        for seed in range(5):
            self.check(random_array((40, 96), seed), scheme)

    def check(self, x, scheme):
        q = _quantize(x, scheme)
        assert q.data.dtype == scheme.dtype and q.scale.dtype == scheme.scale_dtype
        assert q.scale.shape == scheme.scale_shape(x.shape)
        scale = expand(scale_as_float64(q.scale), x.shape, scheme)
        x = x.astype(np.float64)
        assert np.isfinite(scale).all() and (scale > 0).all()
        assert (np.abs(x) <= scale * largest_scaled(scheme)).all()
        # In float64: the largest element times a scale near float32's maximum may overflow float32.
        error = np.abs(x - np.asarray(q.data, np.float64) * scale)
        assert (error <= error_bound(x, scale, scheme)).all()

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @settings(max_examples=20, deadline=None)
    @given(x=ARRAYS)
    def test_odd(self, scheme, x):
        q, negative = _quantize(x, scheme), _quantize(-x, scheme)
        assert_same(negative.scale, q.scale)
        assert_same(negative.data, -np.asarray(q.data))

    @pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.is_mx or s.scale_rule == "pow2"], ids=str)
    def test_powers_of_two_move_the_scale_only(self, scheme):
        x = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
        q = _quantize(x, scheme)
        for k in [-60, -1, 1, 60]:
            moved = _quantize(x * np.float32(2.0**k), scheme)
            assert_same(moved.data, q.data)
            np.testing.assert_array_equal(scale_as_float64(moved.scale), scale_as_float64(q.scale) * 2.0**k)

    @pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.is_mx or s.scale_rule in ("pow2", "unit")], ids=str)
    def test_quantizing_again_changes_nothing(self, scheme):
        once = _dequantize(_quantize(random_array((40, 96)), scheme))
        twice = _dequantize(_quantize(once, scheme))
        np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize("block", [(1, 256), (1, None), (128, 128)])
@pytest.mark.parametrize("shape", [(0, 256), (0, 64), (3, 0)])
def test_no_values_have_no_amax(block, shape):
    q = quantize(jnp.zeros(shape, jnp.bfloat16), Scheme("e4m3", block=block))
    assert q.shape == shape


def test_a_block_larger_than_the_array_takes_no_more_room():
    x = jnp.ones((3, 64), jnp.bfloat16)
    q = jax.eval_shape(lambda x: quantize(x, Scheme("e4m3", block=(2**40, 2**40))), x)
    assert q.scale.shape == (1, 1)
    assert quantize(x, Scheme("e4m3", block=(2**40, 2**40))).scale == np.float32(1 / 448)
