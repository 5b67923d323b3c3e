"""The gated epilogue in the CPU interpreter, with race detection, beside the same kernel's product, gated by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metric import as_bits
from shapes import Shape, operands, quantize

import fp8x
from fp8x import numerics, ops
from fp8x.ops.gate import ClampedSwiGLU, gated, kernel_gate
from fp8x.pallas.epilogue import Gated
from fp8x.pallas.sm90_grouped_fp8 import Tiling, gated_fp8, grouped_fp8
from fp8x.scheme import Scheme, per_row, per_tensor

GROUP, BLOCK = Scheme("e4m3", block=(1, 128)), Scheme("e4m3", block=(128, 128))
SIZES = (70, 0, 29, 5)
CLAMPED = ClampedSwiGLU(limit=1.5)  # which about every fifth product passes


@functools.partial(jax.jit, static_argnames=("gate", "scheme"))
def in_two_steps(y, gate, scheme, scale):
    h = gated(y, gate)
    return numerics.quantize(h, scheme) if scale is None else numerics.quantize_with_scale(h, scale, scheme)


def run(interpreted, i, *, gate="silu", scheme=GROUP, scale=None, dtype=jnp.bfloat16, blocks=True):
    """(data and scales of the gated kernel, those in two steps), of four experts' rows and some past them."""
    weight, of_x = (BLOCK, GROUP) if blocks else (per_row("e5m2"), per_row())
    given = operands(Shape(SIZES, 2 * i, 160, spare=20), weight, dtype=dtype)
    x = quantize(jnp.nan_to_num(given.x), of_x)
    rng = np.random.default_rng(1)
    w = quantize(jnp.asarray(rng.normal(size=(4, 2, i, 160)) * 160**-0.5, jnp.float32), weight)
    bias = jnp.asarray(rng.normal(size=(4, 2, i)), dtype)
    x_scale, w_scale = (x.scale.T, w.scale) if blocks else (x.scale[:, 0], w.scale[..., 0])
    options = dict(tiling=Tiling(128, 256, 2, cluster=2), programs=2)
    function = (lambda gate, up: jnp.maximum(gate, 0) * up) if gate == "relu" else kernel_gate(gate)
    end = Gated(function, jnp.dtype(dtype), scheme, scale is not None)
    inverse = None if scale is None else 1 / scale[0]
    with interpreted():
        data, found = gated_fp8(x.data, w.data, x_scale, w_scale, bias, given.group_sizes, inverse, end=end, **options)
        data, found = np.asarray(data), None if found is None else np.asarray(found)
    y = []
    for p in (0, 1):
        of_part = w.data[:, p], x_scale, w_scale[:, p], bias[:, p]
        with interpreted():
            y.append(np.asarray(grouped_fp8(x.data, *of_part, given.group_sizes, out_dtype=dtype, **options)))
    expected = in_two_steps(jnp.stack(list(map(jnp.asarray, y)), axis=1), gate, scheme, scale)
    return (data, found), (np.asarray(expected.data), np.asarray(expected.scale))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(i=192),
        dict(i=96, scale=jnp.full((1, 1), 0.01), scheme=per_tensor(), blocks=False),
        dict(i=256, scheme=Scheme("e5m2", block=(1, 128), scale_rule="pow2")),
        dict(i=256, scale=jnp.asarray([[0.02, 0.01]]), scheme=Scheme("e4m3", block=(None, 128)), dtype=jnp.float32),
        dict(i=192, scale=jnp.ones((1, 1)), scheme=Scheme("e5m2", block=(None, None), scale_rule="unit")),
    ],
    ids=str,
)
def test_bits_with_an_exact_activation(interpreted, options):
    (data, scale), (expected, expected_scale) = run(interpreted, gate="relu", **options)
    np.testing.assert_array_equal(as_bits(data), as_bits(expected))
    if scale is not None:
        np.testing.assert_array_equal(as_bits(scale), as_bits(expected_scale))
        assert len(np.unique(scale)) > 4
    assert not np.any(data[-20:].astype(np.float32)), "rows past the groups are zero"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(i=128), marks=pytest.mark.slow),
        pytest.param(dict(i=160, gate=CLAMPED), marks=pytest.mark.slow),
        pytest.param(
            dict(i=160, gate=CLAMPED, scale=jnp.full((1, 1), 0.01), scheme=per_tensor(), blocks=False),
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(i=128, gate="gelu_pytorch_tanh", dtype=jnp.float16), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_activations_are_within_a_code(interpreted, options):
    """Kernels take 2^x and 1/√x: h may round to another 16-bit number, a few in a thousand, and one code further."""
    (data, scale), (expected, expected_scale) = run(interpreted, **options)
    if scale is not None:
        np.testing.assert_allclose(scale, expected_scale, rtol=2**-7)
    off = np.abs(as_bits(data).astype(int) - as_bits(expected))
    assert off.max() <= 1 and np.mean(off) < 1e-3


@pytest.mark.parametrize(
    ("code", "gate"),
    [
        ("fp8_e4m3fn_bf16_block_scale", CLAMPED),
        pytest.param("fp8_e4m3fn_bf16_block_scale", "silu", marks=pytest.mark.slow),
        pytest.param("e4m3_e4m3_bf16", CLAMPED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_op(interpreted, code, gate):
    """The kernel and XLA's two steps, which also add in another order: h may round to another 16-bit number, rarely."""
    recipe = fp8x.recipe(code)
    given = operands(Shape((70, 0, 29), 192, 160, spare=7), recipe.weight)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 192, 160)) * 160**-0.5, jnp.float32)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, 192)), jnp.bfloat16)
    options = dict(gate=gate, activation=recipe.activation, out_activation=recipe.activation, bias=bias)
    if recipe.is_static:
        options |= dict(activation_scale=jnp.full((1, 1), 0.05), out_activation_scale=jnp.full((1, 1), 0.02))
    arguments = given.x, quantize(w, recipe.weight), given.group_sizes
    with interpreted():
        (choice,) = ops.explain(lambda *arguments: ops.gated_matmul(*arguments, **options), *arguments)
        h = ops.gated_matmul(*arguments, **options)
        data, scale = np.asarray(h.data), np.asarray(h.scale)
    assert choice.kernel in ("sm90_fp8_block_gated", "sm90_fp8_gated")
    expected = ops.gated_matmul(*arguments, **options)
    np.testing.assert_allclose(scale, expected.scale, rtol=2**-7)
    off = np.abs(as_bits(data).astype(int) - as_bits(expected.data))
    assert off.max() <= 1 and np.mean(off) < 5e-3


@pytest.mark.parametrize("gate", [CLAMPED, pytest.param("silu", marks=pytest.mark.slow)], ids=str)
def test_nan_of_a_product_stays(interpreted, gate):
    """Through clamps, amax and codes; here it comes of biases, of gate and of up, in one of two groups."""
    given = operands(Shape((5, 3), 32, 32), per_row())
    x = quantize(given.x, per_row())
    w = quantize(jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 32, 32)), jnp.float32), per_row())
    bias = jnp.zeros((2, 2, 32)).at[0, 0, 3].set(jnp.nan).at[0, 1, 9].set(jnp.nan)
    end = Gated(kernel_gate(gate), jnp.dtype(jnp.bfloat16), GROUP, False)
    with interpreted():
        data, scale = gated_fp8(
            x.data, w.data, x.scale[:, 0], w.scale[..., 0], bias, given.group_sizes, None, end=end, programs=2
        )
        data, scale = np.asarray(data, np.float32), np.asarray(scale)
    expected = np.zeros((8, 32), bool)
    expected[:5, [3, 9]] = True
    np.testing.assert_array_equal(np.isnan(data), expected)
    assert np.isfinite(scale).all() and np.any(data[5:])
