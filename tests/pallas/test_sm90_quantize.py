"""Quantizing by the kernel, in the CPU interpreter with race detection, bit for bit as `fp8x.numerics`."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from metric import as_bits

import fp8x
from fp8x import numerics, ops
from fp8x.ops.gate import KERNEL_ACTIVATIONS, ClampedSwiGLU, gated, kernel_gate
from fp8x.ops.quantize import QuantizeCall, by_kernel, by_xla, unsupported
from fp8x.pallas.quantize_tiles import THREADS, Tile, choose_tile
from fp8x.pallas.reciprocal import corrected as corrected_in_registers
from fp8x.pallas.sm90_quantize import quantize_blocks
from fp8x.scheme import E8M0, SCALE_RULES, Scheme, mx, per_row, per_tensor

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
INTEGERS = {BF16: np.uint16, F16: np.uint16, F32: np.uint32}
GROUP, TOKEN = Scheme("e4m3", block=(1, 128)), per_row()
POW2 = Scheme("e5m2", block=(1, 128), scale_rule="pow2")
STATIC_GROUP = Scheme("e4m3", block=(None, 128))
MX = [
    Scheme(element, block=(1, 32), scale_dtype=E8M0, scale_rule=rule)
    for element, rule in itertools.product(("e4m3", "e5m2"), SCALE_RULES[E8M0])
]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
kernel = jax.jit(by_kernel, static_argnames=("scheme", "gate"))


def assert_same(actual: fp8x.ScaledArray, expected: fp8x.ScaledArray) -> None:
    """Every byte of data, but that all NaNs are one, and of scales."""
    assert actual.scheme == expected.scheme and actual.scale.dtype == expected.scale.dtype
    np.testing.assert_array_equal(as_bits(actual.scale), as_bits(expected.scale))
    actual, expected = np.asarray(actual.data), np.asarray(expected.data)
    assert actual.dtype == expected.dtype
    actual, expected = (np.where(np.isnan(q.astype(F32)), 0x7F, q.view(np.uint8)) for q in (actual, expected))
    np.testing.assert_array_equal(actual, expected)


def assert_as_numerics(x, scheme: Scheme, scale=None, used=None) -> None:
    """`x` quantized by the kernel and by numerics. The interpreter's processor takes a subnormal float32 for zero when
    it multiplies, so here numerics gets it as zero too, but not when it looks for an amax; see `TestSubnormals`."""
    actual = kernel(x, scheme, scale, used)

    @functools.partial(jax.jit, static_argnums=0)
    def expected(scheme, x, scale):
        x = x if used is None else jnp.where(jnp.arange(x.shape[0])[:, None] < used, x, 0)
        scale = numerics.compute_scale(numerics.block_amax(x, scheme), scheme) if scale is None else scale
        if x.dtype != F16:
            bits = jax.lax.bitcast_convert_type(x, INTEGERS[x.dtype.type])
            exponent = np.array(np.inf, x.dtype).view(bits.dtype)
            x = jnp.where(bits & exponent == 0, jnp.copysign(jnp.zeros((), x.dtype), x), x)
        return numerics.quantize_with_scale(x, scale, scheme)

    assert_same(actual, expected(scheme, x, scale))


def every(dtype) -> np.ndarray:
    """All 65,536 values of a 16-bit type: neighbors first, so that blocks hold one magnitude, then mixed."""
    values = np.arange(2**16, dtype=np.uint16)
    mixed = np.random.default_rng(0).permutation(values)
    return np.stack([values, mixed]).view(dtype).reshape(-1, 256)


def floats() -> np.ndarray:
    """float32 [64, 256] of any exponent, subnormal too; rows of zeros, of one value, of NaN and Inf among others."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**32, (64, 256), dtype=np.uint32).view(np.float32)
    x[:16] = rng.normal(size=(16, 256)) * np.exp(8 * rng.normal(size=(16, 256)))
    x[16], x[17], x[18, :128] = 0.0, -0.0, 1e-40
    x[19], x[20] = np.nan, np.inf
    x[21, ::7], x[22, ::5], x[23, 3] = -np.inf, np.nan, np.finfo(np.float32).max
    x[24] = np.where(rng.random(256) < 0.5, 448.0, rng.normal(size=256))
    x[25] = 2.0 ** rng.integers(-126, -100, 256)
    return x


def normal(shape, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape)), dtype)


@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [
        (BF16, GROUP),
        (BF16, MX[0]),
        (F16, per_row("e5m2")),
        *(slow(BF16, scheme) for scheme in (*MX[1:], POW2, TOKEN, per_row("e5m2"))),
        *(slow(F16, scheme) for scheme in (GROUP, POW2, TOKEN, *MX)),
    ],
    ids=str,
)
def test_every_number_of_16_bits(interpreted, dtype, scheme):
    with interpreted():
        assert_as_numerics(jnp.asarray(every(dtype)), scheme)


@pytest.mark.parametrize("scheme", [POW2, *(slow(scheme) for scheme in (GROUP, TOKEN, *MX))], ids=str)
def test_float32(interpreted, scheme):
    with interpreted():
        assert_as_numerics(jnp.asarray(floats()), scheme)


@pytest.mark.parametrize("dtype", [BF16, slow(F16), slow(F32)])
@pytest.mark.parametrize("element", ["e4m3", slow("e5m2")])
def test_given_scales(interpreted, dtype, element):
    """Also those that numerics never finds: without a reciprocal, negative, not calibrated."""
    x = jnp.asarray(floats() if dtype == F32 else every(dtype)[::5], dtype)
    pairs = [[0.01, 448.0], [1.0, 3e38], [2.0**-126, np.nan], [0.0, -0.3]]
    with interpreted():
        for pair in pairs:
            assert_as_numerics(x, Scheme(element, block=(None, 128)), jnp.asarray([pair], F32))
        assert_as_numerics(x, per_tensor(element), jnp.full((1, 1), 0.37, F32))


@pytest.mark.sample
@pytest.mark.parametrize(
    ("m", "k", "scheme"),
    [
        (0, 256, GROUP),
        (1, 1024, GROUP),
        (65, 384, GROUP),
        (65, 320, MX[0]),
        (63, 2888, TOKEN),  # chunks of a row overlap
        (1, 2888, TOKEN),
        slow(64, 256, TOKEN),
        slow(65, 16384, TOKEN),
        slow(7, 264, TOKEN),
        slow(3, 32768, TOKEN),
        slow(5, 7168, MX[4]),
        slow(129, 1000, Scheme("e5m2", block=(1, 40))),
    ],
    ids=str,
)
def test_ragged(interpreted, m, k, scheme):
    """Tiles that do not divide the rows, chunks that do not divide a block."""
    with interpreted():
        assert_as_numerics(normal((m, k)), scheme)


@pytest.mark.sample
@pytest.mark.parametrize("scheme", [GROUP, slow(TOKEN), slow(MX[0]), STATIC_GROUP], ids=str)
def test_rows_past_the_groups(interpreted, scheme):
    """Whatever they hold: here NaN, which would stay."""
    scale = jnp.asarray([[0.1, 0.2]], F32) if scheme is STATIC_GROUP else None
    with interpreted():
        for used in (0, 1, 40, 69, 70):
            x = normal((70, 256)).at[used:].set(np.nan)
            assert_as_numerics(x, scheme, scale, jnp.int32(used))


def test_several_tiles_for_a_block_of_the_grid(interpreted):
    """A tile that another one than the default chooses; rows that it does not divide."""
    x = normal((1, 300, 128)).reshape(300, 1, 1, 128)
    expected = by_xla(x.reshape(300, 128), TOKEN, None, None)
    with interpreted():
        data, scale = quantize_blocks(x, TOKEN, None, None, tile=Tile(128, 1, 16, 1, 8, 8))
    assert_same(fp8x.ScaledArray(data[:, 0], scale, TOKEN), expected)


class TestSubnormals:
    """A GPU's multiplication keeps them (tests/pallas/test_aot_quantize.py sees to that), and so does numpy's."""

    @pytest.mark.parametrize("element", ["e4m3", "e5m2"])
    def test_one_multiplication_is_what_numerics_makes_of_two(self, element):
        rng = np.random.default_rng(2)
        x = rng.integers(0, 2**23, 4096, dtype=np.uint32).view(np.float32) * np.float32([1, -1])[rng.integers(0, 2)]
        scheme, dtype = per_tensor(element), {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[element]
        for exponent in (-126, -125, -120, -112, -110, -100, 0, 100):
            scale = np.float32(2.0**exponent * rng.uniform(1, 2))
            y = x * (np.float32(1) / scale)
            assert exponent > -125 or np.abs(y).max() > 0.2
            code = np.clip(y, -scheme.max, scheme.max).astype(dtype)
            expected = numerics.quantize_with_scale(x[None], jnp.full((1, 1), scale), scheme)
            np.testing.assert_array_equal(code.view(np.uint8), np.asarray(expected.data[0]).view(np.uint8))


def test_reciprocals_are_exact():
    """From what Mosaic's division may give, `div.full`: two units off at most (PTX ISA, "div")."""
    rng = np.random.default_rng(3)
    bits = rng.integers(1 << 23, 253 << 23, 200_000, dtype=np.int32)
    bits[:512] = np.arange(1, 513) << 22  # powers of two, and the middle between them
    bits[512:1024] = (np.arange(1, 513) << 22) - 1
    bits = np.clip(bits, 1 << 23, (253 << 23) - 1)
    x = bits.view(np.float32)
    exact = (np.float32(1) / x).view(np.int32)
    np.testing.assert_array_equal(np.asarray(numerics.reciprocal(x)).view(np.int32), exact)
    for off in range(-2, 3):
        corrected = jax.jit(corrected_in_registers)((exact + off).view(np.float32), x)
        np.testing.assert_array_equal(np.asarray(corrected).view(np.int32), exact)


class TestGate:
    @pytest.mark.parametrize("gate", KERNEL_ACTIVATIONS)
    @pytest.mark.parametrize("dtype", [BF16, slow(F16)])
    def test_formula(self, gate, dtype):
        """Within 2^-18 of the definition. XLA's gelu cancels (1 + tanh); on a GPU `exp` adds 2^-17."""
        x = every(dtype)[:256].astype(F32)
        x = x[np.isfinite(x)].astype(np.float64)
        inner = x if gate == "silu" else 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        with np.errstate(over="ignore"):
            expected = x / (1 + np.exp(-inner))
        actual = jax.jit(KERNEL_ACTIVATIONS[gate])(jnp.asarray(x, F32))
        np.testing.assert_allclose(actual, expected, rtol=2.0**-18, atol=1e-9)

    @pytest.mark.parametrize("clamped", [ClampedSwiGLU(), ClampedSwiGLU(alpha=3, limit=0.5)], ids=str)
    def test_formula_of_clamped_swiglu(self, clamped):
        """Within 2^-20 of XLA's, and that within 2^-18 of transformers' formula in float64; NaN of either stays."""
        rng = np.random.default_rng(5)
        gate, up = (np.float32(rng.normal(size=4096) * np.exp(2 * rng.normal(size=4096))) for _ in range(2))
        g, u = np.minimum(gate.astype(np.float64), clamped.limit), np.clip(up, -clamped.limit, clamped.limit)
        with np.errstate(over="ignore"):
            expected = (u.astype(np.float64) + 1) * (g / (1 + np.exp(-clamped.alpha * g)))
        by_xla, by_kernel = (
            np.asarray(jax.jit(f)(gate, up)) for f in (clamped, kernel_gate(dataclasses.replace(clamped)))
        )
        assert np.mean(gate > clamped.limit) > 0.05 and np.mean(np.abs(up) > clamped.limit) > 0.1
        np.testing.assert_allclose(by_kernel, by_xla, rtol=2.0**-20, atol=1e-30)
        np.testing.assert_allclose(by_xla, expected, rtol=2.0**-18, atol=1e-30)
        for gate, up in ((np.nan, 9.0), (9.0, np.nan), (-np.inf, 1.0), (np.inf, np.inf), (np.inf, -np.inf)):
            values = [jax.jit(f)(np.float32(gate), np.float32(up)) for f in (clamped, kernel_gate(clamped))]
            np.testing.assert_allclose(*values, rtol=2.0**-20)
            assert np.isnan(values[0]) == (gate == -np.inf or np.isnan(gate) or np.isnan(up))

    @pytest.mark.sample
    @pytest.mark.parametrize(
        ("scheme", "gate", "shape", "dtype"),
        [
            (GROUP, "silu", (33, 384), BF16),
            (MX[0], "silu", (8, 256), BF16),
            (MX[0], ClampedSwiGLU(limit=1.5), (33, 320), BF16),
            slow(TOKEN, ClampedSwiGLU(limit=1.5), (33, 256), F16),
            slow(GROUP, ClampedSwiGLU(limit=1.5), (4, 768), F32),
            slow(STATIC_GROUP, ClampedSwiGLU(), (16, 256), BF16),
            slow(TOKEN, "gelu_pytorch_tanh", (33, 256), F16),
            slow(TOKEN, "silu", (3, 14336), BF16),
            slow(GROUP, "silu", (4, 768), F32),
            slow(per_tensor(), "silu", (16, 512), BF16),
            slow(STATIC_GROUP, "silu", (16, 256), BF16),
        ],
        ids=str,
    )
    def test_bits(self, interpreted, scheme, gate, shape, dtype):
        """Bit for bit what numerics makes of the formula, and that is what `by_xla` quantizes but for a rounding."""
        m, k = shape
        gate_up = normal((m, 2, k), dtype).at[0, 0, 3].set(np.nan).at[1, 1, 40].set(np.nan)
        scale = None
        if scheme.block[0] is None:
            scale = jnp.full(scheme.scale_shape(shape), 0.05, F32)

        @jax.jit
        def by_formula(gate_up):
            return kernel_gate(gate)(gate_up[:, 0].astype(F32), gate_up[:, 1].astype(F32)).astype(dtype)

        h = by_formula(gate_up)
        for used in (None, jnp.int32(m - 2)):
            with interpreted():
                actual = kernel(gate_up, scheme, scale, used, gate)
            assert_same(actual, jax.jit(by_xla, static_argnames="scheme")(h, scheme, scale, used))
        # Both are rounded once, from nearly the same float32 (gelu: 2^-21 of |gate * up| apart): to neighbors.
        actual, other, product = (
            np.nan_to_num(np.asarray(y, np.float64))
            for y in (h, gated(gate_up, gate), jnp.prod(gate_up.astype(F32), axis=1))
        )
        info = jnp.finfo(dtype)
        limit = max(float(info.eps), 2.0**-17) * np.abs(other) + 2.0**-21 * np.abs(product)
        assert np.all(np.abs(actual - other) <= limit + float(info.smallest_subnormal))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            QuantizeCall(8, 256, BF16, per_tensor(), False),
            "finds the amax of one row or a part of it; e4m3 ·×· f32 has",
        ),
        (QuantizeCall(8, 256, BF16, TOKEN, True), "takes float32 scales that hold for all rows; those of e4m3 1×· f32"),
        (QuantizeCall(8, 200, BF16, GROUP, False), "reads whole blocks: 128 has to divide K, which is 200"),
        (QuantizeCall(8, 100, BF16, TOKEN, False), "loads 16 bytes at once, 8 elements, and blocks of 100 are no mult"),
        (QuantizeCall(8, 32776, BF16, TOKEN, False), "keeps blocks of up to 32768 elements in registers, not of 32776"),
        (QuantizeCall(8, 8200, F32, TOKEN, False, "silu"), "keeps blocks of up to 8192 elements in registers, not of"),
        (QuantizeCall(1, 768, BF16, TOKEN, False), "has 128 threads for blocks of 768 elements, and 1 × 1 of them are"),
        (
            QuantizeCall(2**26, 1024, BF16, mx(), False),
            "counts rows, or blocks where each has its own scale, in 32 bits",
        ),
        (
            QuantizeCall(8, 256, BF16, TOKEN, False, "gelu"),
            "applies silu, gelu_pytorch_tanh or a ClampedSwiGLU, not gelu",
        ),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_support(call, reason):
    call = QuantizeCall(call.m, call.k, np.dtype(call.x), call.scheme, call.has_scale, call.gate)
    assert unsupported(call).startswith(reason)


def test_tiles():
    """Threads and elements fit, whatever the shape."""
    shapes = itertools.product(
        (1, 2, 3, 8, 64, 1000, 10**6), (1, 6, 56), (32, 40, 128, 768, 2888, 16384), (2, 4), (1, 2)
    )
    found = 0
    for rows, blocks, width, itemsize, parts in shapes:
        tile = choose_tile(rows, blocks, width, itemsize, parts)
        if isinstance(tile, str):
            continue
        found += 1
        assert tile.thread_rows * tile.thread_blocks * tile.lanes == THREADS
        assert tile.rows % tile.thread_rows == 0 and tile.rows <= rows and blocks % tile.blocks == 0
        assert tile.chunk <= width and tile.vector * itemsize == 16
        assert tile.rows * tile.blocks * width * itemsize * parts <= THREADS * 512
    assert found > 300
    assert choose_tile(16384 * 56, 1, 128, 2) == Tile(64, 1, 32, 1, 4, 8)
    assert choose_tile(8 * 56, 1, 128, 2) == Tile(
        32, 1, 32, 1, 4, 8
    )  # a few tokens: as many blocks of the grid as can be
    assert choose_tile(56, 1, 128, 2) == Tile(8, 1, 8, 1, 16, 8)  # one token: no second tile for the last one
    assert choose_tile(64, 1, 7168, 2) == Tile(1, 1, 1, 1, 128, 8)


class TestInOps:
    def test_explain(self):
        x = jax.ShapeDtypeStruct((16, 256), BF16)
        w = jax.eval_shape(lambda: fp8x.quantize(jnp.ones((128, 256)), per_row()))
        with fp8x.backend("mosaic_gpu"):
            (choice,) = ops.explain(lambda x, w: ops.matmul(x, w, activation=TOKEN), x, w)
            (other,) = ops.explain(lambda x, w: ops.matmul(x, w, activation=per_tensor()), x, w)
        assert str(choice).splitlines()[-1] == "  quantize bfloat16[16, 256] in e4m3 1×· f32: sm90_quantize"
        assert (other.kernel, other.quantize.kernel) == ("sm90_fp8", "xla_quantize")
        (choice,) = ops.explain(lambda x, w: ops.matmul(x, w, activation=TOKEN), x, w)
        assert choice.quantize.kernel == "xla_quantize"
        reason = "there is no GPU here; taken where backend 'mosaic_gpu' is asked for"
        assert choice.quantize.rejected == (("sm90_quantize", reason),)
        assert ops.explain(lambda x, w: ops.matmul(x, w), x, w)[0].quantize is None

    def test_vmap(self, interpreted):
        x = normal((2, 8, 256))
        expected = jax.jit(jax.vmap(lambda x: by_xla(x, mx(), None, None)))(x)
        with interpreted():
            actual = jax.jit(jax.vmap(lambda x: by_kernel(x, mx(), None, None)))(x)
        assert_same(actual, expected)

    @pytest.mark.slow
    def test_gradient(self, interpreted):
        """The op's own: nothing differentiates the kernel."""
        x, w = normal((8, 256), F32), fp8x.quantize(normal((128, 256), F32), per_row())

        def loss(x):
            return jnp.sum(ops.matmul(x, w, activation=TOKEN))

        with interpreted():
            actual = jax.jit(jax.grad(loss))(x)
        np.testing.assert_allclose(actual, jax.grad(loss)(x), rtol=1e-6)
